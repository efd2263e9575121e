"""Engines from graphs, with TensorRT for RTX: ahead of time, for several compute capabilities, no GPU needed."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.errors import BackendError
from mllm_edge.spec import TensorSpec

__all__ = ["Engine", "NetworkReport", "Range", "Sizes", "build", "check_network", "inspect_network", "shape_ranges"]

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkReport:
    """What the parser made of a graph. `causal` names attention layers with a causal mask of their own."""

    layers: Mapping[str, int]
    unused_inputs: tuple[str, ...]
    cache_updates: int
    causal: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """A serialized engine and what it took: seconds, bytes."""

    data: bytes
    seconds: float

    @property
    def nbytes(self) -> int:
        return len(self.data)


def inspect_network(path: Path) -> NetworkReport:
    """Parse the graph and report; raises BackendError with the parser's words."""
    parsed = _Parsed(path)
    network, trt = parsed.network, parsed.trt
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
    report = inspect_network(path)
    problems = [f"input {name} is read by nothing" for name in report.unused_inputs]
    problems += [f"{name} has a causal mask of its own" for name in report.causal]
    if report.cache_updates != cache_updates:
        problems.append(f"{report.cache_updates} in-place caches, not {cache_updates}")
    if problems:
        raise BackendError(f"{path}: TensorRT misreads the graph: {'; '.join(problems)}", "please report this")
    return report


def shape_ranges(
    inputs: Sequence[TensorSpec], sequence: Sizes, past: Sizes, features: Sizes = (1, 1, 1)
) -> dict[str, Range]:
    """The smallest, usual and largest shape of each input of a decoder, text encoder or cross_kv graph.

    `sequence`: new tokens; `past`: positions before them; `features`: what cross-attention looks at. One sequence.
    """
    length = tuple(new + old for new, old in zip(sequence, past, strict=True))
    sizes = {"batch": (1, 1, 1), "rows": (1, 1, 1), "sequence": sequence, "past": past, "length": length}
    sizes["features"] = features

    def shape(tensor: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else sizes[size][which] for size in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in inputs}


def _is_causal(trt: Any, layer: Any) -> bool:
    if layer.type != trt.LayerType.ATTENTION_INPUT:
        return False
    layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to reach what a kind of layer has of its own
    return bool(layer.attention.causal_kind != trt.CausalMaskKind.NONE)


def build(path: Path, profiles: Sequence[Mapping[str, Range]], capabilities: Sequence[str]) -> Engine:
    """Build one engine for all `capabilities` ("SM86", …).

    A profile maps each input with a dynamic shape to its smallest, usual and largest shape. Raises BackendError when
    the graph is refused, a capability unknown or a profile incomplete.
    """
    parsed = _Parsed(path)
    trt, builder = parsed.trt, parsed.builder
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        if not hasattr(trt.ComputeCapability, name):
            raise BackendError(f"TensorRT for RTX {trt.__version__} does not know {name}", "use SM75, SM80, SM86, …")
        config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    for ranges in profiles:
        config.add_optimization_profile(parsed.profile(ranges))
    begin = time.perf_counter()
    data = builder.build_serialized_network(parsed.network, config)
    if data is None:
        raise BackendError(f"{path}: TensorRT for RTX {trt.__version__} built no engine: {parsed.log.last}")
    return Engine(bytes(data), time.perf_counter() - begin)


class _Parsed:
    """A graph in TensorRT's hands; the logger must outlive everything made with it."""

    def __init__(self, path: Path):
        trt = self.trt = _import()
        self.log = _log(trt)
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.log)
        if not self.parser.parse_from_file(str(path)):
            reasons = [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
            raise BackendError(f"{path}: TensorRT for RTX {trt.__version__} does not parse it: {'; '.join(reasons)}")

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


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps the last error; without a GPU, TensorRT complains about the missing driver at every turn."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = message

    return Log()


def _import() -> Any:
    try:
        import tensorrt_rtx as trt
    except ImportError:
        try:
            import tensorrt_rtx_bindings as trt
        except ImportError as e:
            raise BackendError(f"TensorRT for RTX is not installed ({e})", 'pip install "mllm-edge[rtx]"') from e
    return trt
