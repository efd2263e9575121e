"""A bundle's components, each opened by the backend that is wanted or, where that fails, on the CPU."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import TENSORRT, Backend, Session
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.machine.threads import Threads
from mllm_edge.spec import Variant

__all__ = ["Opened", "open_component"]


@dataclass(frozen=True)
class Opened:
    """A component's session, the variant that it runs, and the backend whose memory it uses."""

    session: Session
    variant: Variant
    backend: Backend


def open_component(
    bundle: Bundle, name: str, backend: Backend, threads: int | Threads | None, notice: Callable[[str], None]
) -> Opened:
    """Open a component. When the backend refuses it, the CPU takes it and `notice` is told why.

    Raises BundleError when the bundle has no variant for the backend or its files are damaged, BackendError when no
    backend takes it.
    """
    variant = bundle.variant(name, backend.target)
    try:
        return _open(bundle, variant, backend)
    except BackendError as e:
        targets = {v.target for v in bundle.manifest.components[name].variants}
        if backend.name == "cpu" or "cpu" not in targets:
            raise
        fix = f" ({e.fix})" if e.fix else ""
        notice(f"{name} runs on the CPU instead of {backend.name}: {e.message}{fix}")
    return _open(bundle, bundle.variant(name, "cpu"), open_backend("cpu", threads))


def _open(bundle: Bundle, variant: Variant, backend: Backend) -> Opened:
    """Graph and weights are compared with their checksums on the way; an engine has both, and they were compared before
    it was built."""
    with contextlib.nullcontext() if backend.name in TENSORRT else bundle.checking(variant):
        return Opened(backend.open(bundle.listed(variant.file), variant), variant, backend)
