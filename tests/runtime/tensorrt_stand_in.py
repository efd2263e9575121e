"""A stand-in for the part of TensorRT and CUDA that the backend uses, on a machine that has neither.

An engine holds the graph, its profiles and the folder of its weights, and executes them on ONNX Runtime's CPU provider
when the stream comes to it (see `cuda_stand_in.py`). What the real ones refuse is refused here: shapes outside the
profile, addresses that are missing, freed or too small, caches that are not updated in place, recording what did not
run before as it is, timings of another GPU. Each version has the names and takes the operators of its own.
"""

import base64
import enum
import hashlib
import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.runtime.cuda_stand_in import BAD_ADDRESS, CudaStandIn, cudart
from tests.runtime.tensorrt_versions import refused, without

__all__ = ["StandIn", "install"]

_ALIGNMENT, _MOST_TOP = 256, 3840


class StandIn(CudaStandIn):
    """The made-up machine. `counts`: builds, runs, and what CUDA's stand-in counts; `refuse`: what a build logs before
    it fails, for graphs whose path contains the key; `warn`: what building and opening ("build", "open") warn of;
    `spoil`: what an output is multiplied by; `unknown`: outputs whose size TensorRT does not tell before they ran;
    `warm`: runs of a context until TensorRT for RTX has compiled its kernels; `strategies`: how its contexts record
    graphs; `log`: the logger that TensorRT took first."""

    def __init__(self, version: str, capability: tuple[int, int], gpus: int = 1, rtx: bool = False) -> None:
        super().__init__(capability, gpus)
        self.version, self.rtx = version, rtx
        self.warn: dict[str, str] = {}
        self._log: weakref.ref[_Logger] | None = None
        self.refuse: dict[str, str] = {}
        self.workspaces: list[int] = []
        self.spoil: dict[str, Any] = {}
        self.unknown: Sequence[str] = ()
        self.warm = 3
        self.strategies: list[str] = []

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
    trt, bindings, runtime = _tensorrt(machine), ModuleType("cuda.bindings"), cudart(machine)
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

    def add_topk(self, tensor: _Tensor, operation: enum.IntEnum, k: int, axes: int) -> _Added | None:
        """Of equal values those with the highest ids, as no one says which are taken."""
        if k > _MOST_TOP:
            return None
        assert operation.name == "MAX"
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
        self.flags: list[str] = []
        self.capabilities: dict[int, str] = {}

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag.name)

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
                "flags": config.flags,
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
        "BuilderFlag": enum.IntEnum("BuilderFlag", ["FP16", *(["REQUIRE_USER_ALLOCATION"] if machine.rtx else [])]),
        "ExecutionContextAllocationStrategy": enum.IntEnum("Strategy", ["STATIC", "USER_MANAGED"]),
        "IExecutionContext": _Context,
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
        names["CudaGraphStrategy"] = enum.IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
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
        self.cuda_graph_strategy: Any = None

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache(self._machine)

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class _Engine:
    def __init__(self, machine: StandIn, log: _Logger, plan: dict[str, Any]):
        self.machine, self.log, self.profiles, self.flags = machine, log, plan["profiles"], plan["flags"]
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

    def get_tensor_shape(self, name: str) -> "_Dims":
        return _Dims((self.inputs | self.outputs)[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        return _Location.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> "list[_Dims]":
        return [_Dims(shape) for shape in self.profiles[profile].get(name) or [self.inputs[name].shape] * 3]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, how: Any) -> "_Context":
        """`how`: a strategy, or a runtime configuration that has it."""
        if isinstance(how, _RuntimeConfig):
            assert how.cache is not None
            how.cache.kernels |= {self.key}
            self.machine.strategies.append(getattr(how.cuda_graph_strategy, "name", "DISABLED"))
            how = how.strategy
        assert how.name == "USER_MANAGED"
        return _Context(self)

    def create_runtime_config(self) -> "_RuntimeConfig":
        return _RuntimeConfig(self.machine)


class _Dims:
    """A shape as the bindings return it, which is no tuple."""

    def __init__(self, sizes: Sequence[int]):
        self._sizes = list(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)


class _Context:
    profiler: Any = None

    def __init__(self, engine: _Engine):
        self._engine, self._machine = engine, engine.machine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._runs = -1, 0
        self._work: tuple[int, int] = (0, 0)
        self._ran: Any = None
        self._known: dict[str, tuple[int, ...]] | None = None

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert self._machine.view(address, nbytes) is not None
        self._work = (address, nbytes)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        """As the bindings do, it raises where others return False; shapes have to be told anew."""
        if self._machine.trouble.get("profile"):
            self._fail("the profile is in use")
            raise RuntimeError("Error in set optimization profile.")
        self._machine.stream(stream)
        self._profile, self._shapes, self._known = profile, {}, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile < 0:
            return self._fail("no optimization profile is set")
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))
        if fits:
            self._shapes[name], self._known = tuple(shape), None
        return fits or self._fail(f"{name} {shape} is outside the profile")

    def get_tensor_shape(self, name: str) -> _Dims:
        """Of outputs that are `unknown` only what the graph says."""
        if name in self._machine.unknown:
            return _Dims(self._engine.outputs[name].shape)
        if self._known is None:
            self._known = self._sized(self._shapes)
        return _Dims(self._known[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return (address > 0 and address % _ALIGNMENT == 0) or self._fail(
            f"the address of {name} is null or not aligned"
        )

    def execute_async_v3(self, stream: int) -> bool:
        """Everything is then as it is now, whenever the stream comes to it or a graph is replayed."""
        machine, state = self._machine, (dict(self._shapes), dict(self._addresses), self._work)
        captured = machine.stream(stream).captured is not None
        if captured and state != self._ran:
            return self._fail("it has to run as it is before it is captured")
        if captured and machine.rtx and "REQUIRE_USER_ALLOCATION" not in self._engine.flags:
            return self._fail("the engine allocates while it runs, and cannot be captured")
        if machine.executes and not self._is_complete(*state):
            return False
        if captured:
            assert self.profiler is None, "a replayed graph tells nothing"
            machine.counts["fallback records"] += machine.rtx and self._runs < machine.warm
        else:
            machine.counts["runs"] += 1
            self._runs, self._ran = self._runs + 1, state
        machine.enqueue(stream, lambda: self._run(*state))
        if self.profiler is not None:
            machine.synchronize(stream)
            self._report()
        return True

    def _is_complete(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], work: Any) -> bool:
        """What TensorRT finds when a run is enqueued."""
        if self._machine.view(*work) is None or work[1] < _Engine.device_memory_size_v2:
            return self._fail("no memory to work in")
        if any(view is None for view in self._views(shapes, addresses).values()):
            return self._fail("an address is missing, freed or too small")
        for name, past in self._engine.aliases.items():
            if addresses[name] != addresses[past]:
                return self._fail(f"{name} is not where {past} is")
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], work: tuple[int, int]) -> int:
        """What the GPU does, long after the call."""
        if not self._machine.executes:
            return 0
        views, area = self._views(shapes, addresses), self._machine.view(*work)
        if area is None or any(view is None for view in views.values()):
            return BAD_ADDRESS
        area[:] = 0xEE
        feeds, names = {name: views[name] for name in self._engine.inputs}, list(self._engine.outputs)
        for name, result in zip(names, self._engine.session.run(names, feeds), strict=True):
            views[name][...] = result * self._machine.spoil.get(name, 1)  # type: ignore[index]
        return 0

    def _report(self) -> None:
        """A microsecond for the first node, two for the next, and so on."""
        suffix = f" [profile {self._profile}]" if self._profile else ""
        for i, layer in enumerate(layer for layer in self._engine.layers if layer.name):
            self.profiler.report_layer_time(f"{layer.name}{suffix}", (i + 1) / 1e3)

    def _sized(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of inputs and outputs: the symbols of outputs are those of the inputs, or expressions of them."""
        graph, symbols = self._engine.session, dict[Any, int]()
        for value in graph.get_inputs():
            symbols |= dict(zip(value.shape, shapes[value.name], strict=True))

        def size(dimension: int | str) -> int:
            return dimension if isinstance(dimension, int) else int(eval(dimension, {}, symbols))

        return {**shapes, **{v.name: tuple(map(size, v.shape)) for v in graph.get_outputs()}}

    def _views(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> dict[str, np.ndarray | None]:
        found: dict[str, np.ndarray | None] = {}
        sized = self._sized(shapes)
        for name, tensor in (self._engine.inputs | self._engine.outputs).items():
            memory = self._machine.view(addresses.get(name, 0), int(np.prod(sized[name])) * tensor.dtype.itemsize)
            found[name] = None if memory is None else memory.view(tensor.dtype).reshape(sized[name])
        return found

    def _fail(self, message: str) -> bool:
        self._engine.log.log(_Severity.ERROR, message)
        return False
