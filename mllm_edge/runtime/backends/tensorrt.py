"""TensorRT and TensorRT for RTX: engines from the bundle, built when they are missing, run on one CUDA stream."""

import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import Session
from mllm_edge.runtime.backends.cuda import Cuda, Memory
from mllm_edge.runtime.backends.cuda_arrays import CudaArray
from mllm_edge.runtime.backends.installed import MINIMUM
from mllm_edge.runtime.backends.tensorrt_build import Module, modules
from mllm_edge.runtime.backends.tensorrt_engines import (
    StoredEngine,
    build_workspace,
    builders,
    building_memory,
    default_limits,
    find_engines,
    make_engines,
    plan_segments,
)
from mllm_edge.runtime.backends.tensorrt_layers import LayerTimes, Runs
from mllm_edge.runtime.backends.tensorrt_log import log_of
from mllm_edge.runtime.backends.tensorrt_opened import OpenedEngine
from mllm_edge.runtime.backends.tensorrt_segments import Segment, SegmentedSession
from mllm_edge.runtime.backends.tensorrt_session import EngineSession
from mllm_edge.runtime.backends.tensorrt_steps import Workspace
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.spec import Variant

__all__ = ["GRAPHS", "TensorRT"]

# Set to 0, every step is enqueued anew instead of being replayed from a CUDA graph.
GRAPHS = "MLLM_EDGE_CUDA_GRAPHS"


class TensorRT:
    """Executes the variants for `target`: tensorrt or tensorrt-10.3.

    `max_seq`: the longest sequence that is wanted; an engine for less is built again. `notice` is told before an
    engine is built. `layers` gets the time of every layer in every run, which takes longer then. Raises BackendError
    when there is no GPU, no cuda-bindings or no TensorRT that is new enough.
    """

    def __init__(
        self,
        target: str = "tensorrt",
        max_seq: int | None = None,
        notice: Callable[[str], None] = lambda text: None,
        layers: LayerTimes | None = None,
    ):
        self.name = self.target = target
        self._max_seq, self._notice = max_seq, notice
        modules(MINIMUM[target])
        self._cuda = Cuda()
        self._layers = layers
        # Sessions have it; it goes with the last of them.
        self._workspace: Callable[[], Workspace | None] = lambda: None
        self._told: set[str] = set()
        # A replayed graph tells no layers' times.
        self._graphs = layers is None and os.environ.get(GRAPHS, "1") != "0"

    def open(self, path: Path, variant: Variant) -> Session:
        """Open the engine of a bundle's graph, or those of its segments, built first where there are none for this
        TensorRT and GPU.

        Raises BackendError: TensorRT is missing, too old, refuses the graph or has not enough memory.
        """
        bundle = Bundle.load(path.parent)
        module, stored = self._stored(bundle, variant)
        session = self._opened(module, stored)
        if session is None:
            self._notice(f"{stored[0].path.name} does not open, although it is whole; building it again")
            stored = self._built(bundle, variant, module, anew=True)
            session = self._opened(module, stored)
        if session is None:
            raise BackendError(f"{stored[0].path}: {module.title} does not open the engine that it built")
        return session

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """Zeroed device memory."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = Memory(self._cuda, nbytes)
        self._cuda.clear(memory.address, nbytes)
        return CudaArray(self._cuda, memory, memory.address, shape, np.dtype(dtype))

    def memory_used(self) -> int:
        """Bytes of device memory in use, by all processes."""
        return self._cuda.used_memory()

    def _opened(self, module: Module, stored: Sequence[StoredEngine]) -> Session | None:
        """None when TensorRT does not take an engine."""
        with log_of(module.trt).listening() as said:
            engines = [OpenedEngine.open(module, part.path, self._graphs) for part in stored]
        self._tell(module, said.warnings)
        found = [engine for engine in engines if engine is not None]
        if len(found) < len(stored):
            if said.out_of_memory:  # another one would not open either
                what = f"{stored[0].path}: {module.title} has not enough memory to open the engine: {said.last}"
                raise BackendError(what, "close other programs, or `mllm-edge build` with a smaller --max-seq")
            return None
        most = max(int(engine.engine.device_memory_size_v2) for engine in found)
        workspace = self._workspace() or Workspace(self._cuda, most)
        workspace.reserve(most)
        self._workspace = weakref.ref(workspace)
        segments, sessions = [part.segment for part in stored], []
        for engine, part in zip(found, stored, strict=True):
            variant, runs = part.segment.variant, self._runs(part.segment.variant.file)
            limits = part.limits.sizes(variant)
            sessions.append(EngineSession(self._cuda, engine, variant, limits, self._graphs, workspace, runs))
        return sessions[0] if len(sessions) == 1 else SegmentedSession(sessions, segments, self.allocate)

    def _runs(self, file: str) -> Runs | None:
        """Where another engine of a graph tells its layers' times, if they are asked for."""
        if self._layers is None:
            return None
        runs: Runs = []
        self._layers.setdefault(file, []).append(runs)
        return runs

    def _stored(self, bundle: Bundle, variant: Variant) -> tuple[Module, list[StoredEngine]]:
        """The engines of any module that has them for this GPU, or new ones of the first that can build them."""
        for module in modules(variant.minimum):
            stored = find_engines(bundle, variant, module, self._cuda.capability)
            if stored and (variant.kv_mode is None or stored[0].limits.max_seq >= (self._max_seq or 0)):
                return module, stored
        problems = []
        for module in builders(variant.minimum, self._cuda.capability, self._cuda.capability):
            try:
                return module, self._built(bundle, variant, module)
            except BackendError as e:
                problems.append(e)
        raise problems[0]

    def _built(self, bundle: Bundle, variant: Variant, module: Module, anew: bool = False) -> list[StoredEngine]:
        """Engines of as few segments as the memory allows; `anew`: those that are there, too."""

        def begin(segment: Segment) -> None:
            name, needed = segment.named(variant.file), building_memory(segment) / 1e9
            self._notice(
                f"building the engine of {name} for {self._cuda.capability} with {module.title}, once: "
                f"some minutes, about {needed:.1f} GB of memory"
            )

        segments = plan_segments(bundle, variant, None, read_machine().memory_free)
        limits, workspace = default_limits(bundle, self._max_seq), build_workspace(self._cuda)
        made = make_engines(bundle, segments, module, self._cuda.capability, limits, workspace, begin, anew)
        self._tell(module, [text for stored in made for text in stored.warnings])
        return made

    def _tell(self, module: Module, warnings: Sequence[str]) -> None:
        """Give notice of what TensorRT warns of, once."""
        for text in warnings:
            if text not in self._told:
                self._told.add(text)
                self._notice(f"{module.title} warns: {text}")
