"""A stand-in for the part of TensorRT and CUDA that the backend uses, on a machine that has neither.

Device memory is memory that the stand-in hands out and checks every access to. An engine holds the graph, its profiles
and the folder of its weights, and executes them on ONNX Runtime's CPU provider. What the real ones refuse is refused
here: shapes outside the profile, addresses that are missing, freed or too small, caches that are not updated in place,
copies while a graph is recorded, timings of another GPU. Each version has the names and takes the operators of its own.
"""

import base64
import ctypes
import enum
import hashlib
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.runtime.tensorrt_versions import refused, without

__all__ = ["StandIn", "install"]

_BAD_ADDRESS, _NO_MEMORY, _CAPTURING, _NO_DRIVER = 700, 2, 900, 35
_NAMES = {_BAD_ADDRESS: b"cudaErrorIllegalAddress", _NO_MEMORY: b"cudaErrorMemoryAllocation"}
_NAMES |= {_CAPTURING: b"cudaErrorStreamCaptureUnsupported", _NO_DRIVER: b"cudaErrorInsufficientDriver"}
_STREAM, _ALIGNMENT = 77, 256


class StandIn:
    """The made-up machine. `counts`: builds, runs, records, replays; `refuse`: what a build logs before it fails, for
    graphs whose path contains the key; `warn`: what building and opening ("build", "open") warn of; `trouble`: a number
    to return from a CUDA function, by name; `spoil`: what an output is multiplied by. `model`: name and multiprocessors
    of its GPU; `log`: the logger that TensorRT took first."""

    def __init__(self, version: str, capability: tuple[int, int], gpus: int = 1, rtx: bool = False) -> None:
        self.version, self.capability, self.gpus, self.rtx = version, capability, gpus, rtx
        self.model = ("Orin", 16)
        self.warn: dict[str, str] = {}
        self._log: weakref.ref[_Logger] | None = None
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.free, self.total = 8 << 30, 16 << 30  # other processes have the difference
        self.counts: Counter[str] = Counter()
        self.refuse: dict[str, str] = {}
        self.trouble: dict[str, int] = {}
        self.workspaces: list[int] = []
        self.spoil: dict[str, Any] = {}
        self.recording: list[Callable[[], bool]] | None = None

    def view(self, address: int, nbytes: int) -> np.ndarray | None:
        """Memory that the device reaches, as bytes; None where it is not all of one allocation."""
        for begin, memory in (self.memory | self.pinned).items():
            if begin <= address and address + nbytes <= begin + len(memory):
                return memory[address - begin : address - begin + nbytes]
        return None

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of TensorRT's version; TensorRT for RTX is newer than all."""
        return (99,) if self.rtx else tuple(int(number) for number in self.version.split(".")[:2])

    @property
    def log(self) -> "_Logger":
        log = self._log() if self._log is not None else None
        assert log is not None, "the logger that TensorRT calls is gone"
        return log

    def take(self, log: "_Logger") -> None:
        """TensorRT goes on with the logger that it got first."""
        if self._log is None:
            self._log = weakref.ref(log)
        elif self.log is not log:
            self.log.log(_Severity.WARNING, "The logger differs from one already provided; it is ignored.")

    def allocated(self) -> int:
        return sum(len(memory) for memory in self.memory.values())


def install(
    patch: pytest.MonkeyPatch,
    version: str = "10.16.1",
    capability: tuple[int, int] = (8, 7),
    gpus: int = 1,
    rtx: bool = False,
) -> StandIn:
    """Make `import tensorrt` (or, with `rtx`, tensorrt_rtx) and `import cuda.bindings.runtime` find the stand-in; the
    other TensorRT is not found."""
    machine = StandIn(version, capability, gpus, rtx)
    trt, bindings, runtime = _tensorrt(machine), ModuleType("cuda.bindings"), _cudart(machine)
    bindings.runtime = runtime  # type: ignore[attr-defined]
    package = ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    found = {
        "tensorrt_rtx" if rtx else "tensorrt": trt,
        "cuda": package,
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": runtime,
    }
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    for name, module in found.items():
        patch.setitem(sys.modules, name, module)
    return machine


# ---------------------------------------------------------------- CUDA
def _cudart(machine: StandIn) -> ModuleType:
    api = ModuleType("cuda.bindings.runtime")
    calls = _Calls(machine)
    for name in [n for n in dir(calls) if n.startswith("cuda")]:
        setattr(api, name, _troubled(machine, name, getattr(calls, name)))
    kinds = {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDefault": 4}
    api.cudaMemcpyKind = enum.IntEnum("Kind", kinds)  # type: ignore[attr-defined]
    api.cudaStreamCaptureMode = enum.IntEnum("Mode", {"cudaStreamCaptureModeRelaxed": 2})  # type: ignore[attr-defined]
    names = {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    api.cudaDeviceAttr = enum.IntEnum("Attribute", names)  # type: ignore[attr-defined]
    return api


def _troubled(machine: StandIn, name: str, function: Callable[..., tuple]) -> Callable[..., tuple]:
    def call(*arguments: Any) -> tuple:
        if name in machine.trouble:
            return machine.trouble[name], None
        return function(*arguments)

    return call


class _Calls:
    """The runtime's functions: a status first, then what they return."""

    def __init__(self, machine: StandIn):
        self._machine = machine

    def cudaGetDeviceCount(self) -> tuple:
        return (0, self._machine.gpus) if self._machine.gpus else (_NO_DRIVER, None)

    def cudaSetDevice(self, device: int) -> tuple:
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple:
        return 0, self._machine.capability[attribute - 75]

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        if not self._machine.gpus:
            return _NO_DRIVER, None
        name, multiprocessors = self._machine.model
        return 0, SimpleNamespace(name=name.encode().ljust(256, b"\0"), multiProcessorCount=multiprocessors)

    def cudaGetErrorName(self, status: int) -> tuple:
        return 0, _NAMES[status]

    def cudaStreamCreate(self) -> tuple:
        return 0, _STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        self._machine.counts[f"waits for stream {stream}"] += 1
        return (_CAPTURING if self._machine.recording is not None else 0,)

    def cudaMemGetInfo(self) -> tuple:
        return 0, self._machine.free - self._machine.allocated(), self._machine.total

    def cudaMalloc(self, nbytes: int) -> tuple:
        if nbytes > self._machine.free - self._machine.allocated():
            return _NO_MEMORY, None
        memory = np.full(nbytes + _ALIGNMENT, 0xAB, np.uint8)  # what was there before
        memory = memory[-memory.ctypes.data % _ALIGNMENT :][:nbytes]
        self._machine.memory[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cudaFree(self, address: int) -> tuple:
        self._machine.memory.pop(address)
        return (0,)

    def cudaMallocHost(self, nbytes: int) -> tuple:
        memory = np.zeros(nbytes, np.uint8)
        self._machine.pinned[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple:
        self._machine.pinned.pop(address)
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple:
        def fill() -> bool:
            memory = self._machine.view(address, nbytes)
            if memory is not None:
                memory[:] = value
            return memory is not None

        if self._machine.recording is not None:
            self._machine.recording.append(fill)
            return (0,)
        return (0 if fill() else _BAD_ADDRESS,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple:
        if self._machine.recording is not None:
            return (_CAPTURING,)
        device = {1: [target], 2: [source], 4: [target, source]}[kind]
        if any(self._machine.view(address, nbytes) is None for address in device):
            return (_BAD_ADDRESS,)
        self._machine.counts["bytes copied on the device"] += nbytes if kind == 4 else 0
        self._machine.counts["bytes uploaded"] += nbytes if kind == 1 else 0
        self._machine.counts["bytes downloaded"] += nbytes if kind == 2 else 0
        ctypes.memmove(target, source, nbytes)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self._machine.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        recorded, self._machine.recording = self._machine.recording, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: list, flags: int) -> tuple:
        self._machine.counts["records"] += 1
        return 0, list(graph)

    def cudaGraphLaunch(self, graph: list, stream: int) -> tuple:
        self._machine.counts["replays"] += 1
        return (0 if all(run() for run in graph) else _BAD_ADDRESS,)

    def cudaGraphDestroy(self, graph: list) -> tuple:
        return (0,)

    def cudaGraphExecDestroy(self, graph: list) -> tuple:
        return (0,)


# ---------------------------------------------------------------- TensorRT: building
class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _Logger:
    Severity = _Severity

    def log(self, severity: _Severity, message: str) -> None:
        raise NotImplementedError


class _Monitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError


class _Profiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto):
        kind = value.type.tensor_type
        self.name, self.dtype = value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)


class _Named:
    def __init__(self, name: str):
        self.name = name


class _Layer:
    """A node; its type's name is that of the layer which the parser makes of it."""

    def __init__(self, node: onnx.NodeProto):
        kinds = {"TensorScatter": "KV_CACHE_UPDATE", "Attention": "ATTENTION_INPUT"}
        self.name, self._inputs = node.name, list(node.input)
        self.type = _Named(kinds.get(node.op_type, node.op_type.upper()))
        self._causal = any(a.name == "is_causal" and a.i for a in node.attribute)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        return _Named(self._inputs[index]) if self._inputs[index] else None


class _AttentionLayer(_Layer):
    """What a layer becomes whose class is set to this, as the bindings have it; before, it has no `attention`."""

    kinds: Any = None  # CausalMaskKind, where the version has it

    @property
    def attention(self) -> SimpleNamespace:
        if self.kinds is None:
            return SimpleNamespace(causal=self._causal, decomposable=False)
        kind = self.kinds.UPPER_LEFT if self._causal else self.kinds.NONE
        return SimpleNamespace(causal_kind=kind, decomposable=False)


class _Added:
    """A layer that was added to a network. Its last node has the name."""

    def __init__(self, node: onnx.NodeProto, *outputs: "_Made"):
        self._node, self._outputs = node, outputs

    @property
    def name(self) -> str:
        return self._node.name

    @name.setter
    def name(self, name: str) -> None:
        self._node.name = name

    def get_output(self, index: int) -> "_Made":
        return self._outputs[index]


class _Made:
    """A tensor of an added layer: `source` in the graph, `like` whose last dimension is `size`."""

    def __init__(self, source: str, like: onnx.ValueInfoProto, kind: int, size: int):
        self.name = self.source = source
        self.value = onnx.ValueInfoProto()
        self.value.CopyFrom(like)
        self.value.type.tensor_type.elem_type = kind
        self.value.type.tensor_type.shape.dim[-1].dim_value = size


class _Network:
    model: onnx.ModelProto
    folder: Path
    path: str

    def load(self, data: bytes, path: str) -> None:
        self.model, self.path = onnx.load_from_string(data), path
        graph = self.model.graph
        self.inputs, self.outputs = [_Tensor(v) for v in graph.input], [_Tensor(v) for v in graph.output]
        self.layers = [_Layer(node) for node in graph.node]

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def add_topk(self, tensor: _Tensor, operation: enum.IntEnum, k: int, axes: int) -> _Added:
        """Of equal values those with the highest ids, as no one says which are taken."""
        assert operation.name == "MAX"
        assert 0 < k <= 3840, "a top-k layer of that many is not made"
        like, axis, size = self._found(tensor, axes)
        make, name = onnx.helper.make_node, tensor.name
        for what, values in (("back", np.arange(size)[::-1].copy()), ("k", np.array([k])), ("end", np.array(size - 1))):
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}/{what}"))
        nodes = [
            make("Gather", [name, f"{name}/back"], [f"{name}/turned"], axis=axis),
            make("TopK", [f"{name}/turned", f"{name}/k"], [f"{name}/top", f"{name}/places"], axis=axis),
            make("Sub", [f"{name}/end", f"{name}/places"], [f"{name}/long"]),
            make("Cast", [f"{name}/long"], [f"{name}/ids"], to=onnx.TensorProto.INT32),
        ]
        self.model.graph.node.extend(nodes)
        kinds = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
        made = [_Made(f"{name}/{what}", like, kind, k) for what, kind in zip(("top", "ids"), kinds, strict=True)]
        return _Added(self.model.graph.node[-1], *made)

    def add_reduce(self, tensor: _Tensor, operation: enum.IntEnum, axes: int, keep_dims: bool) -> _Added:
        assert operation.name == "SUM"
        assert keep_dims
        like, axis, _ = self._found(tensor, axes)
        source = f"{tensor.name}/sum"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis]), f"{source}/axis"))
        self.model.graph.node.append(onnx.helper.make_node("ReduceSum", [tensor.name, f"{source}/axis"], [source]))
        return _Added(self.model.graph.node[-1], _Made(source, like, onnx.TensorProto.FLOAT, 1))

    def mark_output(self, tensor: _Made) -> None:
        tensor.value.name = tensor.name
        self.model.graph.node.append(onnx.helper.make_node("Identity", [tensor.source], [tensor.name]))
        self.model.graph.output.append(tensor.value)
        self.outputs.append(_Tensor(tensor.value))

    def _found(self, tensor: _Tensor, axes: int) -> tuple[onnx.ValueInfoProto, int, int]:
        """An output, the only axis, and its size."""
        axis = axes.bit_length() - 1
        assert axes == 1 << axis
        (like,) = [value for value in self.model.graph.output if value.name == tensor.name]
        return like, axis, tensor.shape[axis]

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> _Layer:
        return self.layers[index]


class _Parser:
    machine: StandIn

    def __init__(self, network: _Network, log: _Logger):
        self.machine.take(log)
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def parse_from_file(self, path: str) -> bool:
        return self.parse(Path(path).read_bytes(), path)

    def parse(self, data: bytes, path: str) -> bool:
        self._network.load(data, path)
        caches = {n.input[0] for n in self._network.model.graph.node if n.op_type == "TensorScatter"}
        for tensor in self._network.inputs:
            if tensor.name in caches and tensor.shape[2] < 0:
                self._errors.append("The KV cache tensor must have a static sequence length dimension.")
        self._errors += refused(self._network.model, Path(path).parent, self.machine.numbers)
        return not self._errors

    def get_error(self, index: int) -> Any:
        return type("Error", (), {"desc": lambda _: self._errors[index]})()


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, smallest: tuple, usual: tuple, largest: tuple) -> None:
        self.shapes[name] = [list(smallest), list(usual), list(largest)]


class _Timings:
    """Of `device`; one more "!" for each build."""

    def __init__(self, device: bytes, builds: bytes):
        self.device, self.builds = device, builds

    def serialize(self) -> bytes:
        return b"timings of " + self.device + b": " + self.builds


class _Config:
    machine: StandIn
    progress_monitor: Any = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.workspace, self.timings = 0, None
        self.capabilities: dict[int, str] = {}

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self.capabilities[index] = capability.name
        return index < self.num_compute_capabilities

    def set_memory_pool_limit(self, pool: Any, nbytes: int) -> None:
        self.workspace = nbytes

    def create_timing_cache(self, data: bytes) -> _Timings | None:
        if not data:
            return _Timings(self._device(), b"")
        begin, _, builds = data.partition(b": ")
        whole = begin.startswith(b"timings of ") and builds.strip(b"!") == b""
        return _Timings(begin.removeprefix(b"timings of "), builds) if whole else None

    def set_timing_cache(self, cache: _Timings, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, _Timings):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        if not ignore_mismatch and cache.device != self._device():
            return False
        self.timings = cache
        return True

    def _device(self) -> bytes:
        assert not self.machine.rtx, "TensorRT for RTX asks a GPU for it"
        return f"{self.machine.model} with {self.machine.version}".encode()

    def get_timing_cache(self) -> Any:
        return self.timings


def _check_shapes(profile: Mapping[str, list[list[int]]], tensors: list[_Tensor]) -> None:
    for tensor in (t for t in tensors if -1 in t.shape):
        for shape in profile[tensor.name]:
            assert len(shape) == len(tensor.shape), tensor.name
            assert all(wanted in (-1, size) for wanted, size in zip(tensor.shape, shape, strict=True)), tensor.name
        smallest, usual, largest = (np.array(shape) for shape in profile[tensor.name])
        assert (smallest > 0).all(), f"{tensor.name}: nobody promises that kernels take nothing"
        assert (smallest <= usual).all(), tensor.name
        assert (usual <= largest).all(), tensor.name


def _tensorrt(machine: StandIn) -> ModuleType:
    numbers, old = machine.numbers, machine.numbers < (10, 15)
    kinds = enum.IntEnum("CausalMaskKind", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"]) if numbers >= (11,) else None
    ahead = () if machine.rtx else ("set_compute_capability", "num_compute_capabilities")
    config_class = without(_Config, *ahead, machine=machine)
    absent = ["create_runtime_config"] if numbers < (10, 13) else []
    engine_class = without(_Engine, *absent, *(["get_aliased_input_tensor"] if old else []))

    class Builder:
        def __init__(self, log: _Logger):
            machine.take(log)

        def create_network(self, flags: int) -> _Network:
            assert flags == (1 << 1 if machine.numbers < (11,) else 0), "types are the graph's own"
            return _Network()

        def create_builder_config(self) -> _Config:
            return config_class()

        def create_optimization_profile(self) -> _Profile:
            return _Profile()

        def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
            machine.counts["builds"] += 1
            machine.workspaces.append(config.workspace)
            for key, reason in machine.refuse.items():
                if key in network.path:
                    if reason:
                        machine.log.log(_Severity.ERROR, reason)
                    return None
            if "build" in machine.warn:
                machine.log.log(_Severity.WARNING, machine.warn["build"])
            if config.progress_monitor is not None and not _steps(config.progress_monitor):
                return None
            for profile in config.profiles:
                _check_shapes(profile.shapes, network.inputs)
            if config.timings is not None:
                config.timings.builds += b"!"
            plan = {
                "model": base64.b64encode(network.model.SerializeToString()).decode(),
                "folder": str(Path(network.path).parent),
                "profiles": [profile.shapes for profile in config.profiles],
                "version": machine.version,
                "gpu": list(machine.model),
                "capabilities": list(config.capabilities.values()) or [_name_of(machine.capability)],
            }
            return json.dumps(plan).encode()

    class Runtime:
        def __init__(self, log: _Logger):
            machine.take(log)

        def deserialize_cuda_engine(self, data: Any) -> Any:
            if machine.trouble.get("deserialize"):
                machine.trouble["deserialize"] -= 1
                machine.log.log(_Severity.ERROR, machine.refuse.get("open", "magic tag does not match"))
                return None
            plan = json.loads(bytes(data))
            if plan["version"] != machine.version or _name_of(machine.capability) not in plan["capabilities"]:
                return None
            if not machine.rtx and plan["gpu"] != list(machine.model):
                # Opened all the same; some fail then, and some are wrong.
                machine.log.log(_Severity.WARNING, "Using an engine plan file across different models of devices …")
            if "open" in machine.warn:
                machine.log.log(_Severity.WARNING, machine.warn["open"])
            return engine_class(machine, machine.log, plan)

    trt = ModuleType("tensorrt_rtx" if machine.rtx else "tensorrt")
    names = {
        "__version__": machine.version,
        "Builder": Builder,
        "ExecutionContextAllocationStrategy": enum.IntEnum("Strategy", ["STATIC", "USER_MANAGED"]),
        "ILogger": _Logger,
        "IProfiler": _Profiler,
        "IProgressMonitor": _Monitor,
        "MemoryPoolType": enum.IntEnum("Pool", ["WORKSPACE"]),
        "NetworkDefinitionCreationFlag": enum.IntEnum("Flag", {"STRONGLY_TYPED": 1}),
        "OnnxParser": without(_Parser, machine=machine),
        "ReduceOperation": enum.IntEnum("ReduceOperation", ["SUM"]),
        "TopKOperation": enum.IntEnum("TopKOperation", ["MAX"]),
        "Runtime": Runtime,
        "TensorIOMode": _Mode,
        "TensorLocation": _Location,
    }
    if not old:
        names["IAttentionInputLayer"] = without(_AttentionLayer, kinds=kinds)
        names["IKVCacheUpdateLayer"] = _Layer
    if kinds is not None:
        names["CausalMaskKind"] = kinds
    if numbers >= (10, 13):
        names["IRuntimeConfig"] = _RuntimeConfig
    if machine.rtx:
        names["IRuntimeCache"] = _RuntimeCache
        names["ComputeCapability"] = enum.IntEnum("ComputeCapability", ["CURRENT", "SM86", "SM89"])
    for name, value in names.items():
        setattr(trt, name, value)
    return trt


def _name_of(capability: tuple[int, int]) -> str:
    return f"SM{capability[0]}{capability[1]}"


def _steps(monitor: _Monitor) -> bool:
    """Phases as TensorRT reports them: one within another, in any number."""
    monitor.phase_start("Building engine", None, 2)
    monitor.phase_start("Timing", "Building engine", 4)
    for step in range(4):
        if not monitor.step_complete("Timing", step):
            return False
    monitor.phase_finish("Timing")
    done = monitor.step_complete("Building engine", 0) and monitor.step_complete("Building engine", 1)
    monitor.phase_finish("Building engine")
    return done


# ---------------------------------------------------------------- TensorRT: running
class _Mode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


class _Location(enum.IntEnum):
    DEVICE = 0
    HOST = 1


class _RuntimeCache:
    """Kernels by the hash of their engine; `counts`: caches that were taken and refused."""

    def __init__(self, machine: StandIn):
        self._machine, self.kernels = machine, set()  # type: StandIn, set[str]

    def deserialize(self, data: bytes) -> bool:
        begin = f"{self._machine.version}:".encode()
        good = data.startswith(begin)
        self._machine.counts["caches taken" if good else "caches refused"] += 1
        if good:
            self.kernels = set(data[len(begin) :].decode().split(","))
        return good

    def serialize(self) -> bytes:
        return f"{self._machine.version}:{','.join(sorted(self.kernels))}".encode()


class _RuntimeConfig:
    def __init__(self, machine: StandIn):
        self._machine, self.cache, self.strategy = machine, None, None  # type: StandIn, _RuntimeCache | None, Any

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache(self._machine)

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class _Engine:
    def __init__(self, machine: StandIn, log: _Logger, plan: dict[str, Any]):
        self.machine, self.log, self.profiles = machine, log, plan["profiles"]
        data = base64.b64decode(plan["model"])
        self.key = hashlib.sha256(data).hexdigest()[:8]
        network = _Network()
        network.load(data, "")
        self.inputs, self.outputs = {t.name: t for t in network.inputs}, {t.name: t for t in network.outputs}
        self.layers = network.layers
        scatters = [n for n in network.model.graph.node if n.op_type == "TensorScatter"]
        self.aliases = {n.output[0]: n.input[0] for n in scatters}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", plan["folder"])
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    device_memory_size_v2 = 1 << 16
    num_io_tensors = property(lambda self: len(self.inputs) + len(self.outputs))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in self.inputs else _Mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.inputs | self.outputs)[name].shape

    def get_tensor_location(self, name: str) -> Any:
        return _Location.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.profiles[profile].get(name) or [list(self.inputs[name].shape)] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, how: Any) -> "_Context":
        """`how`: a strategy, or a runtime configuration that has it."""
        if isinstance(how, _RuntimeConfig):
            assert how.cache is not None
            how.cache.kernels |= {self.key}
            how = how.strategy
        assert how.name == "USER_MANAGED"
        return _Context(self)

    def create_runtime_config(self) -> "_RuntimeConfig":
        return _RuntimeConfig(self.machine)


class _Context:
    profiler: Any = None

    def __init__(self, engine: _Engine):
        self._engine, self._machine = engine, engine.machine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._work, self._changes = -1, False, 0

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._work = self._machine.view(address, nbytes) is not None and nbytes >= _Engine.device_memory_size_v2

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return stream == _STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
            self._changes += 1
        return fits or self._fail(f"{name} {shape} is outside the profile")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The symbols of an output are those of the inputs."""
        graph = self._engine.session
        symbols: dict[Any, int] = {}
        for value in graph.get_inputs():
            symbols |= dict(zip(value.shape, self._shapes[value.name], strict=True))
        (output,) = [value for value in graph.get_outputs() if value.name == name]
        return tuple(d if isinstance(d, int) else symbols[d] for d in output.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        self._changes += 1
        return address % _ALIGNMENT == 0 or self._fail(f"the address of {name} is not aligned")

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == _STREAM
        if self._machine.recording is not None:
            assert self.profiler is None, "a replayed graph tells nothing"
            changes = self._changes
            self._machine.recording.append(lambda: changes == self._changes and self._run())
            return True
        self._machine.counts["runs"] += 1
        return self._run()

    def _run(self) -> bool:
        if not self._work:
            return self._fail("no memory to work in")
        feeds = {name: self._view(name, tensor) for name, tensor in self._engine.inputs.items()}
        targets = {name: self._view(name, tensor) for name, tensor in self._engine.outputs.items()}
        if any(view is None for view in (*feeds.values(), *targets.values())):
            return self._fail("an address is missing, freed or too small")
        for name, past in self._engine.aliases.items():
            if self._addresses[name] != self._addresses[past]:
                return self._fail(f"{name} is not where {past} is")
        for name, result in zip(targets, self._engine.session.run(list(targets), feeds), strict=True):
            targets[name][...] = result * self._machine.spoil.get(name, 1)  # type: ignore[index]
        if self.profiler is not None:
            self._report()
        return True

    def _report(self) -> None:
        """A microsecond for the first node, two for the next, and so on."""
        suffix = f" [profile {self._profile}]" if self._profile else ""
        for i, layer in enumerate(layer for layer in self._engine.layers if layer.name):
            self.profiler.report_layer_time(f"{layer.name}{suffix}", (i + 1) / 1e3)

    def _view(self, name: str, tensor: _Tensor) -> np.ndarray | None:
        shape = self._shapes[name] if name in self._shapes else self.get_tensor_shape(name)
        nbytes = int(np.prod(shape)) * tensor.dtype.itemsize
        memory = self._machine.view(self._addresses.get(name, 0), nbytes)
        return None if memory is None else memory.view(tensor.dtype).reshape(shape)

    def _fail(self, message: str) -> bool:
        self._engine.log.log(_Severity.ERROR, message)
        return False
