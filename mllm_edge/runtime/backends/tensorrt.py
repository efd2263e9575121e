"""TensorRT and TensorRT for RTX: engines from the bundle, built when they are missing, run on one CUDA stream."""

import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import HIDDEN, Session
from mllm_edge.runtime.backends.cuda import Cuda, Graph, Memory, Pinned
from mllm_edge.runtime.backends.cuda_arrays import CudaArray, taken
from mllm_edge.runtime.backends.installed import MINIMUM
from mllm_edge.runtime.backends.tensorrt_best import best_outputs
from mllm_edge.runtime.backends.tensorrt_build import Module, modules
from mllm_edge.runtime.backends.tensorrt_contexts import Contexts
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
from mllm_edge.runtime.backends.tensorrt_layers import LayerTimes, Runs, layer_profiler
from mllm_edge.runtime.backends.tensorrt_log import log_of
from mllm_edge.runtime.backends.tensorrt_segments import Segment, SegmentedSession
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.spec import TensorSpec, Variant, input_of, is_state

__all__ = ["GRAPHS", "TensorRT"]

# Set to 0, every step is enqueued anew instead of being replayed from a CUDA graph.
GRAPHS = "MLLM_EDGE_CUDA_GRAPHS"
# Attention over in-place caches spans a multiple of this many positions, the surplus hidden: steps share their shapes.
_SPAN = 64


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
            engines = [_Engine.open(module, part.path) for part in stored]
        self._tell(module, said.warnings)
        found = [engine for engine in engines if engine is not None]
        if len(found) < len(stored):
            if said.out_of_memory:  # another one would not open either
                what = f"{stored[0].path}: {module.title} has not enough memory to open the engine: {said.last}"
                raise BackendError(what, "close other programs, or `mllm-edge build` with a smaller --max-seq")
            return None
        work = Memory(self._cuda, max(int(engine.engine.device_memory_size_v2) for engine in found))
        segments = [part.segment for part in stored]
        sessions = []
        for engine, part in zip(found, stored, strict=True):
            variant, runs = part.segment.variant, self._runs(part.segment.variant.file)
            limits = part.limits.sizes(variant)
            sessions.append(_Session(self._cuda, engine, variant, limits, self._graphs, work, runs))
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


@dataclass(frozen=True)
class _Engine:
    """An engine and what must outlive it."""

    trt: Any
    log: Any
    runtime: Any
    engine: Any
    contexts: Contexts

    @classmethod
    def open(cls, module: Module, path: Path) -> "_Engine | None":
        """None when TensorRT does not take it."""
        log = log_of(module.trt)
        runtime = module.trt.Runtime(log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            return None
        contexts = Contexts(module.trt, engine, path.with_name(f"{path.name}.cache"))
        return cls(module.trt, log, runtime, engine, contexts)

    @property
    def inputs(self) -> list[str]:
        return [n for n in self._names() if self.engine.get_tensor_mode(n) == self.trt.TensorIOMode.INPUT]

    @property
    def top_logits(self) -> tuple[TensorSpec, ...]:
        """The outputs that its graph does not have."""
        return best_outputs(self.engine, self._names())

    def ranges(self, profile: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Smallest and largest shape of each input."""
        found = {}
        for name in self.inputs:
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, profile)
            found[name] = (tuple(smallest), tuple(largest))
        return found

    def check(self, variant: Variant) -> None:
        """Raise BackendError unless inputs and outputs are the variant's, and caches are updated in place."""
        known = {t.name for t in (*variant.inputs, *variant.outputs, *self.top_logits)}
        if set(self._names()) != known:
            raise BackendError(f"the engine of {variant.file} has other inputs or outputs than its graph")
        for name in self._names():
            if self.engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE:
                raise BackendError(f"the engine of {variant.file} wants {name} in host memory", "please report this")
        if variant.kv_mode == "in_place" and hasattr(self.engine, "get_aliased_input_tensor"):
            for name in (t.name for t in variant.outputs if is_state(t.name, "growing")):
                past = input_of(name)
                if self.engine.get_aliased_input_tensor(name) != past:
                    raise BackendError(f"the engine of {variant.file} does not update {past} in place")

    def _names(self) -> list[str]:
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]


class _Session:
    """Arrays are copied to the device at each run; buffers and arrays in CUDA memory are used where they lie.

    Contexts, one for each profile, share the memory `work` that their kernels work in: one runs at a time. Two for each
    where there is recurrent state, whose buffers take turns: a recorded step keeps its addresses.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: _Engine,
        variant: Variant,
        limits: Mapping[str, int],
        graphs: bool,
        work: Memory,
        runs: Runs | None,
    ):
        engine.check(variant)
        self.limits = {**limits, "top_logits": int(engine.top_logits[0].shape[-1])} if engine.top_logits else limits
        self._cuda, self._engine, self._variant = cuda, engine, variant
        self._inputs = {t.name: t for t in variant.inputs}
        self._outputs = (*variant.outputs, *engine.top_logits)
        self._span = limits["capacity"] if variant.kv_mode == "in_place" else 0
        self._ranges = [engine.ranges(i) for i in range(engine.engine.num_optimization_profiles)]
        self._work = work
        self._contexts: dict[tuple[int, int], _Context] = {}
        self._turning = next((name for name in self._inputs if is_state(name, "recurrent")), "")
        self._turn, self._read = 0, 0
        self._graphs, self._runs = graphs and variant.kv_mode is not None, runs
        self._fed: dict[str, Any] = {}
        self._uploaded: dict[str, np.ndarray] = {}
        self._targets: dict[str, Any] = {}
        self._memory: dict[str, Memory] = {}
        self._pinned: dict[str, Pinned] = {}
        self._nothing: Memory | None = None

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._fed.update({name: self._checked(name, value) for name, value in inputs.items()})
        for name, target in outputs.items():
            if target is None:
                self._targets.pop(name, None)
            else:
                self._targets[name] = target

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.bind(feeds, {})
        missing = [name for name in self._inputs if name not in self._fed]
        if missing:
            raise BackendError(f"{self._variant.file}: input {missing[0]} was not given")
        values = self._behind({name: self._widened(name, value) for name, value in self._fed.items()})
        read = getattr(values.get(self._turning), "address", 0)
        if read != self._read:
            self._turn, self._read = 1 - self._turn, read
        context = self._context({name: tuple(value.shape) for name, value in values.items()})
        addresses = {name: self._address(name, value) for name, value in values.items()}
        shapes = context.shapes([t.name for t in self._outputs])
        addresses |= {t.name: self._output(t, shapes[t.name]) for t in self._outputs}
        context.run(addresses)
        for name, target in self._targets.items():
            if isinstance(target, CudaArray) and addresses[name] != target.address:
                self._cuda.copy(target.address, addresses[name], target.nbytes)
        return self._results(shapes, addresses)

    def _checked(self, name: str, value: Any) -> Any:
        """A buffer, or a C-contiguous array of the graph's type."""
        if name not in self._inputs:
            raise BackendError(f"{self._variant.file} has no input {name}")
        value = taken(self._cuda, name, value)
        wanted = np.dtype(self._inputs[name].dtype)
        if value.dtype != wanted:
            raise BackendError(f"{self._variant.file}: input {name} is {value.dtype}, not {wanted}")
        return value

    def _widened(self, name: str, value: Any) -> Any:
        """A bias over in-place caches, spanning a multiple of positions; those too many are hidden."""
        if not self._span or not name.startswith("attention_bias") or isinstance(value, CudaArray):
            return value
        length = value.shape[-1]
        span = min(-(-length // _SPAN) * _SPAN, self._span)
        return np.pad(value, [(0, 0)] * 3 + [(0, max(0, span - length))], constant_values=HIDDEN)

    def _behind(self, values: dict[str, Any]) -> dict[str, Any]:
        """With a hidden row of zeros in the place of an empty past: nobody promises that kernels take one."""
        empty = [name for name, value in values.items() if is_state(name, "growing") and 0 in value.shape]
        for name in empty:
            past, nbytes = values[name], math.prod(values[name].shape[2:]) * values[name].dtype.itemsize
            if self._nothing is None or self._nothing.nbytes < nbytes:
                self._nothing = Memory(self._cuda, nbytes)
                self._cuda.clear(self._nothing.address, nbytes)
            shape = (1, 1, *past.shape[2:])
            values[name] = CudaArray(self._cuda, self._nothing, self._nothing.address, shape, past.dtype)
        for name in [name for name in values if name.startswith("attention_bias") and empty]:
            values[name] = np.pad(values[name], [(0, 0)] * 3 + [(1, 0)], constant_values=HIDDEN)
        return values

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> "_Context":
        """The context of the last profile that takes these shapes: the narrower one, made for decoding."""
        for index in reversed(range(len(self._ranges))):
            if all(_within(shape, *self._ranges[index][name]) for name, shape in shapes.items()):
                key = (index, self._turn)
                if key not in self._contexts:
                    made = _Context(self._cuda, self._engine, index, self._work, self._graphs, self._runs)
                    self._contexts[key] = made
                self._contexts[key].reshape(shapes)
                return self._contexts[key]
        name, shape = next((n, s) for n, s in shapes.items() if not _within(s, *self._ranges[0][n]))
        smallest, largest = self._ranges[0][name]
        raise BackendError(
            f"{self._variant.file}: {name} is {list(shape)}, its engine takes {list(smallest)} to {list(largest)}",
            "`mllm-edge build` with a larger --max-seq, --max-images or --max-batch",
        )

    def _address(self, name: str, value: Any) -> int:
        if isinstance(value, CudaArray) and value.aligned:
            return value.address
        memory = self._room(name, value.nbytes)
        if isinstance(value, CudaArray):
            self._cuda.copy(memory.address, value.address, value.nbytes)
            self._uploaded.pop(name, None)
        elif value.flags.writeable or self._uploaded.get(name) is not value:
            self._cuda.upload(memory.address, value)
            self._uploaded[name] = value
        return memory.address

    def _output(self, tensor: TensorSpec, shape: tuple[int, ...]) -> int:
        target = self._targets.get(tensor.name)
        if target is not None and tuple(target.shape) != shape:
            raise BackendError(f"{self._variant.file}: {tensor.name} is {list(shape)}, bound to {list(target.shape)}")
        if isinstance(target, CudaArray) and target.aligned:
            return target.address
        # New rows of an append cache may begin anywhere: those rows, never the cache, are copied behind the run.
        return self._room(tensor.name, math.prod(shape) * np.dtype(tensor.dtype).itemsize).address

    def _room(self, name: str, nbytes: int) -> Memory:
        """Device memory for a tensor; it grows and never shrinks, so that addresses stay."""
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < nbytes:
            memory = self._memory[name] = Memory(self._cuda, nbytes)
        return memory

    def _results(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Outputs on the host: into bound arrays, or as new ones; what the graph does not have only when bound."""
        found = {}
        for tensor in self._outputs:
            wanted = tensor in self._variant.outputs or tensor.name in self._targets
            if wanted and not isinstance(self._targets.get(tensor.name), CudaArray):
                found[tensor.name] = self._landing(tensor, shapes[tensor.name])
                self._cuda.download(found[tensor.name], addresses[tensor.name])
        if found:  # else the next segment can be enqueued at once
            self._cuda.wait()
        for name in [name for name in found if name in self._targets]:
            np.copyto(self._targets[name], found.pop(name))
        return {name: array.copy() for name, array in found.items()}

    def _landing(self, tensor: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
        pinned = self._pinned.get(tensor.name)
        if pinned is None or pinned.array.shape != shape:
            pinned = self._pinned[tensor.name] = Pinned(self._cuda, shape, np.dtype(tensor.dtype))
        return pinned.array


class _Context:
    """One profile's execution context.

    A step is enqueued plainly when shapes or addresses changed, recorded when it comes again, then replayed.
    """

    def __init__(self, cuda: Cuda, engine: _Engine, profile: int, work: Memory, graphs: bool, runs: Runs | None):
        self._cuda, self._engine, self._graphs, self._runs = cuda, engine, graphs, runs
        self._context = engine.contexts.make()
        if self._context is None:
            raise BackendError(f"TensorRT makes no execution context: {engine.log.errors[-1:]}")
        self._context.set_device_memory(work.address, work.nbytes)
        self._require(self._context.set_optimization_profile_async(profile, cuda.stream), f"profile {profile}")
        if runs is not None:
            self._context.profiler = self._profiler = layer_profiler(engine.trt, runs)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._graph: Graph | None = None
        self._same = False

    def reshape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell the shapes of the inputs."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._require(self._context.set_input_shape(name, shape), f"{name} {list(shape)}")
                self._shapes[name] = shape
                self._forget()

    def shapes(self, outputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of outputs, now that those of the inputs are known."""
        return {name: tuple(self._context.get_tensor_shape(name)) for name in outputs}

    def run(self, addresses: Mapping[str, int]) -> None:
        """Enqueue one run."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
                self._addresses[name] = address
                self._forget()
        if self._graph is None and self._graphs and self._same:
            self._record()
        if self._graph is not None:
            self._cuda.launch(self._graph)
        else:
            self._enqueue()
        self._same = True

    def _record(self) -> None:
        try:
            self._graph = self._cuda.capture(self._enqueue)
        except BackendError:
            self._graphs = False  # some engines cannot be captured; they run all the same

    def _enqueue(self) -> None:
        if self._runs is not None:
            self._runs.append([])
        self._require(self._context.execute_async_v3(self._cuda.stream), "a run")

    def _forget(self) -> None:
        self._graph, self._same = None, False

    def _require(self, done: bool, what: str) -> None:
        if not done:
            said = self._engine.log.errors[-1:] or ["it does not say why"]
            raise BackendError(f"TensorRT refuses {what}: {said[0]}")


def _within(shape: Sequence[int], smallest: Sequence[int], largest: Sequence[int]) -> bool:
    fits = len(shape) == len(smallest)
    return fits and all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
