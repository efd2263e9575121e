"""Runs of one profile: TensorRT is told shapes and addresses, and what comes again is replayed from a CUDA graph."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda, Graph, Memory
from mllm_edge.runtime.backends.tensorrt_layers import Runs, layer_profiler
from mllm_edge.runtime.backends.tensorrt_opened import OpenedEngine
from mllm_edge.runtime.log import logger

__all__ = ["Context", "Step", "Workspace"]

# Graphs of one context; the next one takes the place of that which was not used for longest.
_MOST_GRAPHS = 8
# Steps whose shapes and addresses are remembered.
_MOST_STEPS = 64


class Workspace:
    """Memory that the kernels of all contexts work in, one after the other: they run on one stream."""

    def __init__(self, cuda: Cuda, nbytes: int):
        self._cuda, self.memory = cuda, Memory(cuda, nbytes)
        self.moves = 0  # how often it was replaced by a larger one

    def reserve(self, nbytes: int) -> None:
        """Room for an engine that wants so much."""
        if self.memory.nbytes < nbytes:
            self._cuda.wait()  # for whoever works there
            self.memory = Memory(self._cuda, nbytes)
            self.moves += 1


@dataclass(eq=False)
class Step:
    """What a run is to TensorRT: shapes of the inputs, addresses of inputs and outputs. `expected`: the shapes that
    outputs must have. A recorded one has a graph."""

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    expected: Mapping[str, tuple[int, ...]]
    graph: Graph | None = None
    runs: int = 0  # without one
    checked: bool = False  # that TensorRT expects the same
    used: int = 0  # when it ran last


class Context:
    """One profile's execution context.

    A step is enqueued plainly the first two times, recorded behind the second, then replayed, whatever ran in between:
    a graph holds shapes and addresses. Raises BackendError when TensorRT refuses the profile.
    """

    def __init__(
        self, cuda: Cuda, engine: OpenedEngine, profile: int, workspace: Workspace, graphs: bool, runs: Runs | None
    ):
        self._cuda, self._engine, self._workspace, self._runs = cuda, engine, workspace, runs
        self._graphs = graphs and not engine.contexts.compiles
        self._context = engine.contexts.make()
        if self._context is None:
            raise BackendError(f"TensorRT makes no execution context: {engine.said()}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._told: Step | None = None
        self._steps: OrderedDict[tuple[object, ...], Step] = OrderedDict()
        self._recorded: list[Step] = []
        self._spare: list[Graph] = []  # that may become others
        self._clock = 0
        self._take_workspace()
        try:
            done = self._context.set_optimization_profile_async(profile, cuda.stream)
        except RuntimeError as e:  # the bindings raise where they return False elsewhere
            raise BackendError(f"TensorRT refuses profile {profile}: {engine.said()}") from e
        self._require(done, f"profile {profile}")
        if runs is not None:
            self._context.profiler = self._profiler = layer_profiler(engine.module.trt, runs)

    def step(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        expected: Mapping[str, tuple[int, ...]],
    ) -> Step:
        """The step with these shapes and addresses, which may have run before."""
        key = (*shapes.values(), *addresses.values())
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = Step(shapes, addresses, expected)
            if len(self._steps) > _MOST_STEPS:
                self._steps.popitem(last=False)
        return step

    def output_shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """An output's shape, for what TensorRT alone knows."""
        self._reshape(shapes)
        found = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if -1 in found:
            raise BackendError(f"TensorRT does not tell the shape of {name}: {list(found)}", "please report this")
        return found

    def forget(self) -> None:
        """Memory that steps used is gone."""
        while self._recorded:
            self._take_graph(self._recorded[0])
        self._steps.clear()

    def run(self, step: Step) -> None:
        """Enqueue one run."""
        if self._workspace.moves != self._moves:
            self._take_workspace()
        self._clock += 1
        step.used = self._clock
        if step.graph is not None:
            self._cuda.launch(step.graph)
            return
        if step is not self._told:
            self._tell(step)
        self._enqueue()
        step.runs += 1
        if self._graphs and step.runs > 1:
            self._record(step)

    def _take_workspace(self) -> None:
        self._moves, work = self._workspace.moves, self._workspace.memory
        self._context.set_device_memory(work.address, work.nbytes)
        self.forget()

    def _tell(self, step: Step) -> None:
        self._told = None
        self._reshape(step.shapes)
        for name, address in step.addresses.items():
            if self._addresses.get(name) != address:
                self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
                self._addresses[name] = address
        if not step.checked:
            self._check(step.expected)
            step.checked = True
        self._told = step

    def _reshape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._told = None
                self._require(self._context.set_input_shape(name, shape), f"{name} {list(shape)}")
                self._shapes[name] = shape

    def _check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """TensorRT must agree about outputs; of some it does not say the size (-1)."""
        for name, shape in expected.items():
            says = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if len(says) != len(shape) or any(s not in (size, -1) for s, size in zip(says, shape, strict=True)):
                raise BackendError(f"TensorRT makes {list(says)} of {name}, not {list(shape)}", "please report this")

    def _record(self, step: Step) -> None:
        """Behind a plain run of the same step, as TensorRT wants it; what is recorded does not run."""
        if not self._spare and len(self._recorded) >= _MOST_GRAPHS:
            self._take_graph(min(self._recorded, key=lambda recorded: recorded.used))
        try:
            step.graph = self._cuda.capture(self._enqueue, self._spare.pop() if self._spare else None)
            self._recorded.append(step)
        except BackendError as e:
            self._graphs = False  # some engines cannot be captured; they run all the same
            logger.info("steps run without CUDA graphs: %s", e)

    def _take_graph(self, step: Step) -> None:
        """It is worth keeping: becoming another one costs a fraction of being made."""
        if step.graph is not None:
            self._spare.append(step.graph)
        step.graph, step.runs = None, 0
        self._recorded.remove(step)

    def _enqueue(self) -> None:
        if self._runs is not None:
            self._runs.append([])
        self._require(self._context.execute_async_v3(self._cuda.stream), "a run")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"TensorRT refuses {what}: {self._engine.said()}")
