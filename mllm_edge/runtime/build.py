"""Engines of a bundle for one GPU: this machine's, or with TensorRT for RTX another one's."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backend import TENSORRT
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.tensorrt_build import Module
from mllm_edge.runtime.backends.tensorrt_engines import (
    Limits,
    build_workspace,
    builders,
    building_memory,
    default_limits,
    find_engine,
    make_engine,
)
from mllm_edge.spec import Variant

__all__ = ["BuildPlan", "BuiltEngine", "Progress", "build_engines", "plan_build"]

_PARTS = 1000


class Progress(Protocol):
    """Is told what is being done; both may raise to end the work."""

    def stage(self, title: str, total: int = 0) -> None: ...

    def advance(self, amount: int) -> None: ...


@dataclass(frozen=True)
class BuildPlan:
    """What will be built with what. `memory`: bytes of host memory that each component's build takes, roughly."""

    bundle: Bundle
    target: str
    device: str
    module: Module
    limits: Limits
    workspace: int
    memory: Mapping[str, int]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine's file in the bundle, its bytes, and the seconds it took; 0 when a good one was there."""

    component: str
    file: str
    nbytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_build(
    path: str | Path,
    *,
    device: str = "auto",
    target: str | None = None,
    max_seq: int | None = None,
    max_images: int = 4,
    max_batch: int = 1,
) -> BuildPlan:
    """Choose target, TensorRT and limits for the bundle in `path`; nothing is built yet.

    `device`: auto for this machine's GPU, or a compute capability such as sm86. `target` None: the first that the
    bundle has and a TensorRT here builds. Raises BundleError; BackendError when nothing here can build for the device.
    """
    bundle = Bundle.load(path)
    limits = default_limits(bundle, max_seq, max_images, max_batch)
    wanted, here, workspace = _device(device)
    problems = []
    for name in [target] if target else _targets(bundle):
        variants = {c: bundle.variant(c, name) for c in bundle.manifest.components}
        try:
            module = builders(variants["decoder"].minimum, wanted, here)[0]
        except BackendError as e:
            problems.append(e)
            continue
        memory = {c: building_memory(bundle, v) for c, v in variants.items()}
        return BuildPlan(bundle, name, wanted, module, limits, workspace, memory)
    raise problems[-1]


def build_engines(plan: BuildPlan, progress: Progress) -> list[BuiltEngine]:
    """Build one component after the other; an engine with the same limits that is there is kept.

    Raises BackendError when TensorRT refuses a graph or memory is too small; engines that are done stay.
    """
    found = []
    for component in plan.bundle.manifest.components:
        variant, begin = plan.bundle.variant(component, plan.target), time.perf_counter()
        stored = find_engine(plan.bundle, variant, plan.module, plan.device)
        if stored is None or stored.limits != plan.limits:
            progress.stage(f"building {component}", _PARTS)
            stored = _make(plan, variant, progress)
            seconds = time.perf_counter() - begin
        else:
            progress.stage(f"{component} is there")
            seconds = 0.0
        file = stored.path.relative_to(plan.bundle.path).as_posix()
        found.append(BuiltEngine(component, file, stored.path.stat().st_size, seconds))
    return found


def _make(plan: BuildPlan, variant: Variant, progress: Progress) -> Any:
    return make_engine(
        plan.bundle, variant, plan.module, plan.device, plan.limits, plan.workspace, _advancing(progress)
    )


def _advancing(progress: Progress) -> Callable[[float], None]:
    """From how much is done to how much was added."""
    told = 0

    def advance(part: float) -> None:
        nonlocal told
        parts = int(part * _PARTS)
        progress.advance(parts - told)
        told = parts

    return advance


def _device(device: str) -> tuple[str, str, int]:
    """The compute capability to build for, that of this machine ("" for none), and bytes for kernels to work in."""
    if device != "auto" and not re.fullmatch(r"sm\d+", device.lower()):
        raise BackendError(f"{device!r} is no compute capability", "--device auto, or one like sm86")
    try:
        cuda = Cuda()
    except BackendError as e:
        if device != "auto":
            return device.lower(), "", 0
        raise BackendError(e.message, f"{e.fix}; for another machine's GPU name it, for example --device sm86") from e
    here = cuda.capability
    wanted = here if device == "auto" else device.lower()
    return wanted, here, build_workspace(cuda) if wanted == here else 0


def _targets(bundle: Bundle) -> list[str]:
    have = [variant.target for variant in bundle.manifest.components["decoder"].variants]
    found = [target for target in TENSORRT if target in have]
    if not found:
        raise BackendError(
            f"{bundle.path}: the bundle has no graphs for TensorRT, only for {', '.join(sorted(have))}",
            "export it with --target tensorrt, or --target tensorrt-10.3 for JetPack 6",
        )
    return found
