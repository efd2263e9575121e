"""Engines of a bundle for one GPU: this machine's, or with TensorRT for RTX another one's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.lock import locked
from mllm_edge.runtime.backends.base import TENSORRT
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.tensorrt_build import Module
from mllm_edge.runtime.backends.tensorrt_engines import (
    Limits,
    StoredEngine,
    build_workspace,
    builders,
    building_memory,
    default_limits,
    find_engines,
    make_engines,
    plan_segments,
)
from mllm_edge.runtime.backends.tensorrt_segments import Segment
from mllm_edge.runtime.machine.hardware import read_machine

__all__ = ["BuildPlan", "BuiltEngine", "Progress", "build_engines", "plan_build"]

_PARTS = 1000


class Progress(Protocol):
    """Is told what is being done; both may raise to end the work."""

    def stage(self, title: str, total: int = 0) -> None: ...

    def advance(self, amount: int) -> None: ...


@dataclass(frozen=True)
class BuildPlan:
    """What will be built with what. `segments`: what each component's engines are made of, one but for a decoder;
    `exactly`: whether engines that divide a decoder otherwise do not serve; `free`: bytes of host memory, 0 when not
    known."""

    bundle: Bundle
    target: str
    device: str
    module: Module
    limits: Limits
    workspace: int
    segments: Mapping[str, tuple[Segment, ...]]
    exactly: bool
    free: int

    @property
    def memory(self) -> dict[str, tuple[int, ...]]:
        """Bytes of host memory that the build of each engine takes, roughly."""
        return {c: tuple(building_memory(segment) for segment in parts) for c, parts in self.segments.items()}


@dataclass(frozen=True)
class BuiltEngine:
    """An engine's file in the bundle, its bytes, the seconds it took (0 when a good one was there), and what TensorRT
    warned of. A decoder's may run `segment` of `segments` only."""

    component: str
    file: str
    nbytes: int
    seconds: float
    segment: int = 1
    segments: int = 1
    warnings: tuple[str, ...] = ()

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
    segments: int | None = None,
) -> BuildPlan:
    """Choose target, TensorRT, limits and segments for the bundle in `path`; nothing is built yet.

    `device`: auto for this machine's GPU, or a compute capability such as sm86. `target` None: the first that the
    bundle has and a TensorRT here builds. `segments`: of the decoder; None for as few as the free memory allows.
    Raises BundleError; BackendError when nothing here can build for the device, or the decoder not be cut so often.
    """
    bundle = Bundle.load(path)
    limits = default_limits(bundle, max_seq, max_images, max_batch)
    wanted, here, workspace = _device(device)
    free = read_machine().memory_free
    problems = []
    for name in [target] if target else _targets(bundle):
        variants = {c: bundle.variant(c, name) for c in bundle.manifest.components}
        try:
            module = builders(variants["decoder"].minimum, wanted, here)[0]
        except BackendError as e:
            problems.append(e)
            continue
        parts = {c: plan_segments(bundle, v, segments, free) for c, v in variants.items()}
        return BuildPlan(bundle, name, wanted, module, limits, workspace, parts, segments is not None, free)
    raise problems[-1]


def build_engines(plan: BuildPlan, progress: Progress) -> list[BuiltEngine]:
    """Build one component after the other; an engine with the same limits that is there is kept.

    Raises BackendError when TensorRT refuses a graph or memory is too small; engines that are done stay. Raises
    BusyError when another process works on the bundle.
    """
    with locked(plan.bundle.path):
        return _build(plan, progress)


def _build(plan: BuildPlan, progress: Progress) -> list[BuiltEngine]:
    found = []
    for component in plan.bundle.manifest.components:
        engines = _kept(plan, component)
        if engines:
            progress.stage(f"{component} is there")
        for engine in engines or _made(plan, component, progress):
            file, segment = engine.path.relative_to(plan.bundle.path).as_posix(), engine.segment
            nbytes = engine.path.stat().st_size
            part = segment.number, segment.count
            found.append(BuiltEngine(component, file, nbytes, engine.seconds, *part, engine.warnings))
    return found


def _kept(plan: BuildPlan, component: str) -> list[StoredEngine]:
    """The engines of a component, where none has to be built."""
    variant, count = plan.bundle.variant(component, plan.target), len(plan.segments[component])
    found = find_engines(plan.bundle, variant, plan.module, plan.device)
    good = found and found[0].limits == plan.limits and (len(found) == count or not plan.exactly)
    return found if good else []


def _made(plan: BuildPlan, component: str, progress: Progress) -> list[StoredEngine]:
    def begin(segment: Segment) -> Callable[[float], None]:
        progress.stage(f"building {segment.named(component)}", _PARTS)
        return _advancing(progress)

    segments = plan.segments[component]
    return make_engines(plan.bundle, segments, plan.module, plan.device, plan.limits, plan.workspace, begin)


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
