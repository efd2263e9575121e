"""Engines from graphs, with TensorRT or TensorRT for RTX; the latter builds ahead of time, and needs no GPU."""

import contextlib
import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.errors import BackendError
from mllm_edge.files import write_whole
from mllm_edge.install import install_hint
from mllm_edge.runtime.backends.cuda import gpu_model
from mllm_edge.runtime.backends.installed import engines, version_numbers
from mllm_edge.runtime.backends.tensorrt_best import add_best
from mllm_edge.runtime.backends.tensorrt_log import Said, log_of
from mllm_edge.runtime.onnx_file.dimensions import fix_dimensions

__all__ = [
    "Engine",
    "Module",
    "NetworkReport",
    "Options",
    "Range",
    "Sizes",
    "build",
    "check_network",
    "inspect_network",
    "modules",
]

_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
_SMALLER = "a smaller --max-seq, --max-images or --max-batch, or a bundle of `mllm-edge export --recipe int4`"

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Module:
    """TensorRT or TensorRT for RTX: `name` tensorrt or tensorrt_rtx, as in `Variant.minimum`. `gpu`: the model that its
    engines are for; "" where they are for all GPUs with a compute capability."""

    name: str
    version: str
    trt: Any
    gpu: str = ""

    @property
    def title(self) -> str:
        return f"{_TITLES[self.name]} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for other GPUs than the one it runs on."""
        return self.name == "tensorrt_rtx"

    def capability(self, device: str) -> str:
        """ "sm86" as it calls it: SM86; raises BackendError that lists those it builds for."""
        name = device.upper()
        if name in ("CURRENT", "NONE") or not hasattr(self.trt.ComputeCapability, name):
            known = [n for n in self.trt.ComputeCapability.__members__ if n.startswith("SM")]
            raise BackendError(f"{self.title} does not build for {device}", f"it builds for {', '.join(known).lower()}")
        return name


@dataclass(frozen=True)
class Options:
    """How to build. `sizes`: numbers for symbolic dimensions; `cache_updates`: in-place caches that TensorRT must see
    (None: unchecked); `workspace`: bytes of device memory for kernels to work in, 0 for TensorRT's default;
    `timing_cache`: a file of timings to start from and to keep; `progress(part)`: how much of 1 is done, may raise;
    `top_logits`: the engine of a decoder also returns the largest logits, see `top_logits.py`; `graph`: a serialized
    graph in place of the file's, whose path then only says where the weights lie; `segments`: how many would take less
    memory, 0 where the graph cannot be cut."""

    sizes: Mapping[str, int] | None = None
    cache_updates: int | None = None
    workspace: int = 0
    timing_cache: Path | None = None
    progress: Callable[[float], None] | None = None
    top_logits: bool = False
    graph: bytes | None = None
    segments: int = 0


@dataclass(frozen=True)
class NetworkReport:
    """What the parser made of a graph. `causal` names attention layers with a causal mask of their own."""

    layers: Mapping[str, int]
    unused_inputs: tuple[str, ...]
    cache_updates: int
    causal: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """A serialized engine, where TensorRT put it, the seconds it took, and what TensorRT warned of."""

    data: memoryview
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def inspect_network(path: Path) -> NetworkReport:
    """Parse the graph and report; raises BackendError with the parser's words."""
    return _report(_Parsed(path, _rtx()))


def _report(parsed: "_Parsed") -> NetworkReport:
    network, trt = parsed.network, parsed.module.trt
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    causal = [layer.name for layer in layers if _is_causal(trt, layer)]
    kinds = Counter(layer.type.name for layer in layers)
    return NetworkReport(
        layers=dict(kinds),
        unused_inputs=tuple(name for name in inputs if name not in read and name not in outputs),
        cache_updates=kinds["KV_CACHE_UPDATE"],
        causal=tuple(causal),
    )


def check_network(path: Path, cache_updates: int) -> NetworkReport:
    """Raise BackendError when TensorRT made something else of the graph than it says: an input that nothing reads, a
    causal mask of TensorRT's own, or another number of in-place caches than `cache_updates`."""
    return _check(path, inspect_network(path), cache_updates)


def _check(path: Path, report: NetworkReport, cache_updates: int) -> NetworkReport:
    problems = [f"input {name} is read by nothing" for name in report.unused_inputs]
    problems += [f"{name} has a causal mask of its own" for name in report.causal]
    if report.cache_updates != cache_updates:
        problems.append(f"{report.cache_updates} in-place caches, not {cache_updates}")
    if problems:
        raise BackendError(f"{path}: TensorRT misreads the graph: {'; '.join(problems)}", "please report this")
    return report


def _is_causal(trt: Any, layer: Any) -> bool:
    if not _is_attention(trt, layer):
        return False
    if hasattr(trt, "CausalMaskKind"):
        return bool(layer.attention.causal_kind != trt.CausalMaskKind.NONE)
    return bool(layer.attention.causal)  # TensorRT 10


def _is_attention(trt: Any, layer: Any) -> bool:
    """Whether a layer begins an attention; `layer.attention` can be reached then."""
    if layer.type.name != "ATTENTION_INPUT":  # older TensorRT has no such layer
        return False
    layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to reach what a kind of layer has of its own
    return True


def modules(minimum: Mapping[str, str]) -> list[Module]:
    """Installed modules that are new enough (module → lowest version), TensorRT before TensorRT for RTX.

    Raises BackendError that says what is there, when there is none.
    """
    found, installed = [], engines()
    for name in _TITLES:
        engine = installed.get(name)
        if engine is None or engine.problem or name not in minimum:
            continue
        if version_numbers(engine.version) >= version_numbers(minimum[name]):
            gpu = gpu_model() if name == "tensorrt" else ""
            found.append(Module(name, engine.version, importlib.import_module(engine.module), gpu))
    if not found:
        wanted = " or ".join(f"{_TITLES[name]} ≥ {minimum[name]}" for name in _TITLES if name in minimum)
        here = [f"{_TITLES[n]} {e.problem or e.version}" for n, e in installed.items() if n in _TITLES]
        raise BackendError(
            f"needs {wanted}, here is {', '.join(here) or 'no TensorRT'}",
            f"{install_hint('rtx')}, or TensorRT itself; see `mllm-edge doctor`",
        )
    return found


def build(
    path: Path,
    profiles: Sequence[Mapping[str, Range]],
    capabilities: Sequence[str] = (),
    module: Module | None = None,
    options: Options | None = None,
) -> Engine:
    """Build one engine for all `capabilities` ("SM86", …), or for the GPU of this machine.

    A profile maps each input with a dynamic shape to its smallest, usual and largest shape. Raises BackendError when
    the graph is refused, a capability unknown, a profile incomplete or memory too small.
    """
    module = module or _rtx()
    with log_of(module.trt).listening() as said:
        return _build(path, profiles, capabilities, module, options or Options(), said)


def _build(
    path: Path,
    profiles: Sequence[Mapping[str, Range]],
    capabilities: Sequence[str],
    module: Module,
    options: Options,
    said: Said,
) -> Engine:
    parsed, trt = _Parsed(path, module, options.sizes, options.graph), module.trt
    if options.cache_updates is not None:
        _check(path, _report(parsed), options.cache_updates)
    if options.top_logits:
        add_best(trt, parsed.network)
    config = parsed.builder.create_builder_config()
    if capabilities:
        names = [module.capability(name) for name in capabilities]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # contexts get their memory; only so are runs recorded
    for ranges in profiles:
        config.add_optimization_profile(parsed.profile(ranges))
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    monitor = config.progress_monitor = _monitor(trt, options.progress) if options.progress else None
    if options.timing_cache is not None:
        _start_from(config, options.timing_cache)
    begin = time.perf_counter()
    try:
        data = parsed.builder.build_serialized_network(parsed.network, config)
    except MemoryError:
        data = None
        said.add("errors", "out of memory")
    if monitor is not None and monitor.stopped is not None:
        raise monitor.stopped
    if data is None:
        raise _no_engine(path, module, said, options.segments)
    if options.timing_cache is not None:
        _keep_timings(config, options.timing_cache)
    # Not copied: an engine is as large as its weights, of which the network still holds one copy.
    return Engine(memoryview(data), time.perf_counter() - begin, tuple(said.warnings))


def _no_engine(path: Path, module: Module, said: Said, segments: int) -> BackendError:
    if said.out_of_memory:
        what = f"{path}: {module.title} has not enough memory to build the engine: {said.last}"
        fewer = f"--segments {segments}, " if segments else ""
        return BackendError(what, f"close other programs, or use {fewer}{_SMALLER}")
    return BackendError(f"{path}: {module.title} built no engine: {said.last}")


def _start_from(config: Any, path: Path) -> None:
    """Take the timings of an earlier build, or begin anew where TensorRT refuses them: another device's or driver's,
    or damaged ones."""
    known = b""
    with contextlib.suppress(OSError):
        known = path.read_bytes()
    for data in dict.fromkeys((known, b"")):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _keep_timings(config: Any, path: Path) -> None:
    """They only save time: an engine that is built does not fail for them."""
    cache = config.get_timing_cache()
    if cache is not None:
        with contextlib.suppress(OSError):
            write_whole(path, bytes(cache.serialize()), durable=False)


class _Parsed:
    """A graph in TensorRT's hands."""

    def __init__(self, path: Path, module: Module, sizes: Mapping[str, int] | None = None, graph: bytes | None = None):
        self.module, trt = module, module.trt
        log = log_of(trt)
        self.builder = trt.Builder(log)
        self.network = self.builder.create_network(_network_flags(module))
        self.parser = trt.OnnxParser(self.network, log)
        if not self._parse(path, sizes, graph):
            reasons = [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
            raise BackendError(f"{path}: {module.title} does not parse it: {'; '.join(reasons)}")
        for i in range(self.network.num_layers):
            layer = self.network.get_layer(i)
            if _is_attention(trt, layer):
                # Where no fused kernel fits (float32, odd heads), several kernels do; else the build would fail.
                layer.attention.decomposable = True

    def _parse(self, path: Path, sizes: Mapping[str, int] | None, graph: bytes | None) -> bool:
        if sizes or graph:
            # The path says where the weights lie.
            return bool(self.parser.parse(fix_dimensions(graph or path.read_bytes(), sizes or {}), str(path)))
        return bool(self.parser.parse_from_file(str(path)))

    def profile(self, ranges: Mapping[str, Range]) -> Any:
        profile = self.builder.create_optimization_profile()
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            if -1 not in tuple(tensor.shape):
                continue
            if tensor.name not in ranges:
                raise BackendError(f"the profile lacks a range for input {tensor.name} {list(tensor.shape)}")
            profile.set_shape(tensor.name, *ranges[tensor.name])
        return profile


def _network_flags(module: Module) -> int:
    """Types are the graph's own everywhere; only TensorRT 10 has to be told."""
    if module.name == "tensorrt" and version_numbers(module.version) < (11,):
        return 1 << int(module.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Phases lie within steps of others: the outermost one's share is what is done. TensorRT calls this from
        threads of its own, where nothing may be raised: `stopped` keeps what `progress` raised."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int]] = {}
            self._done: dict[str, float] = {}
            self._lock, self._shown = threading.Lock(), 0.0
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, max(num_steps, 1))
                self._done[phase_name] = 0.0

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)
                self._done.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                try:
                    self._advance(phase_name, step + 1.0)
                    progress(self._shown)
                except BaseException as e:  # Ctrl-C as well: it is raised again when TensorRT has stopped
                    self.stopped = self.stopped or e
                return self.stopped is None

        def _advance(self, name: str, done: float) -> None:
            whole = 0.0
            while name in self._phases:
                parent, steps = self._phases[name]
                self._done[name] = max(self._done[name], done)
                whole = min(1.0, self._done[name] / steps)
                if parent is None or parent not in self._phases:
                    break
                name, done = parent, int(self._done[parent]) + whole
            self._shown = max(self._shown, whole)

    return Monitor()


def _rtx() -> Module:
    return next(module for module in modules({"tensorrt_rtx": "1.0"}))
