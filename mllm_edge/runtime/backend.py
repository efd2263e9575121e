"""The seam between the runtime and whatever executes graphs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.threads import Threads
from mllm_edge.spec import Variant

__all__ = ["BACKENDS", "TENSORRT", "Backend", "Buffer", "Session", "open_backend"]

TENSORRT = ("tensorrt", "tensorrt-10.3")
BACKENDS = ("auto", "cpu", "cuda", *TENSORRT)


class Buffer(Protocol):
    """Memory that a session reads and writes in place, and that outlives a run."""

    @property
    def nbytes(self) -> int: ...

    def read(self, axis: int, length: int) -> np.ndarray:
        """A copy of the first `length` entries along `axis`."""
        ...

    def write(self, axis: int, values: np.ndarray) -> None:
        """Overwrite the first entries along `axis` by `values`."""
        ...

    def part(self, axis: int, start: int, stop: int) -> "Buffer":
        """The entries start … stop − 1 along `axis` as a buffer of their own over the same memory; the part must be
        contiguous (all dimensions before `axis` are 1)."""
        ...


class Session(Protocol):
    """One opened component."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of a symbolic dimension, where there is one; caches must have exactly `capacity`. `best`:
        how many of the largest logits of a row the session finds itself, see `runtime/best.py`."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run with arrays in and new arrays out; unbound outputs only. What is fed stays bound, and its contents are
        read at each run, unless the array is read-only: then it is taken to stay as it is until another is given."""
        ...

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Keep buffers (or arrays) bound to inputs and outputs for all later runs; contents are read at each run.
        Outputs that `limits["best"]` stands for are left out unless bound; None for one of them unbinds it."""
        ...


class Backend(Protocol):
    """Opens components. `target` says which variants it executes."""

    name: str
    target: str

    def open(self, path: Path, variant: Variant) -> Session:
        """Open a component's graph; raises BackendError when the runtime refuses it."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zeroed memory where this backend's sessions want it."""
        ...


def open_backend(
    name: str = "auto",
    threads: int | Threads | None = None,
    target: str = "cpu",
    *,
    bundle: Bundle | None = None,
    max_seq: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Backend:
    """The backend called `name`; `auto` takes TensorRT where this machine and the decoder of `bundle` are made for it,
    else ONNX Runtime's CUDA provider likewise, else the processor, which always works. That one executes the graphs
    made for `target`: other targets' serve comparisons.

    `max_seq`: tokens that a sequence must be able to have. `notice` is told about what takes long. Raises BackendError
    for an unknown name or a runtime that is not installed.
    """
    if name == "auto":
        name = "cpu" if bundle is None else _best(bundle)
    if name == "cpu":
        from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

        return OnnxRuntimeCpu(threads, target)
    if name == "cuda":
        from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda()
    if name in TENSORRT:
        from mllm_edge.runtime.backends.tensorrt import TensorRT

        return TensorRT(name, max_seq, notice)
    raise BackendError(f"unknown backend {name!r}", f"use --backend {', '.join(BACKENDS)}")


def _best(bundle: Bundle) -> str:
    """The first target of the GPU that the decoder has and this machine executes; cpu where there is none."""
    targets = [variant.target for variant in bundle.manifest.components["decoder"].variants]
    if any(target in targets for target in TENSORRT):
        from mllm_edge.runtime.backends.tensorrt_engines import usable

        for target in TENSORRT:
            if target in targets and usable(target):
                return target
    if "cuda" in targets:
        from mllm_edge.runtime.backends import onnxruntime_cuda

        return "cuda" if onnxruntime_cuda.usable() else "cpu"
    return "cpu"
