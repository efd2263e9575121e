"""Half precision holds numbers up to 65504: which values of a graph come near that, and operators kept from it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.segments import Segment, cut, extract
from mllm_edge.runtime.backends.base import Backend, Session
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import Variant

__all__ = ["IN_FLOAT32", "LIMIT", "InFloat32", "find_peaks", "half_values", "in_float32", "widen"]

# Half of float16's largest number: what is seen is a sample of what a device will see.
LIMIT = 65504.0 / 2
_SEGMENT_BYTES = 384 << 20
_ROWS = 64  # of the logits
_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Operators whose results have the type of another input than the first, or are no floats.
_TYPE_FROM = {"Where": 1, "DequantizeLinear": 1}
_NOT_FLOAT = frozenset({"ArgMax", "Equal", "Greater", "Less", "QuantizeLinear", "Shape", "Size"})
IN_FLOAT32 = ".float32"  # ends the name of a tensor that is stored once more for operators in float32
_PEAK, _SUM = "::peak", "::sum"  # no name of a graph ends so


def half_values(graph: ir.Graph) -> set[ir.Value]:
    """The float16 values of a graph: inputs, weights and what nodes make."""
    half = {v for v in (*graph.inputs, *graph.initializers.values()) if v.dtype == _HALF}
    for node in graph:
        if node.op_type == "Cast":
            is_half = node.attributes["to"].as_int() == _HALF
        elif node.op_type in ("Constant", "ConstantOfShape"):
            is_half = "value" in node.attributes and node.attributes["value"].as_tensor().dtype == _HALF
        else:
            source = _TYPE_FROM.get(node.op_type, 0)
            is_half = len(node.inputs) > source and node.inputs[source] in half and node.op_type not in _NOT_FLOAT
        if is_half:
            half |= set(node.outputs)
    return half


def in_float32(model: ir.Model) -> ir.Model:
    """`model`, changed in place: all that is float16 in it is float32."""
    graph = model.graph
    for name, value in graph.initializers.items():
        stored = value.const_value
        if stored is not None and stored.dtype == _HALF:
            value.const_value = ir.tensor(stored.numpy().astype(np.float32), name=name)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
        constant = node.attributes.get("value")
        if constant is not None and constant.type == ir.AttributeType.TENSOR:
            held = constant.as_tensor()
            if held.dtype == _HALF:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(held.numpy().astype(np.float32)))
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *made):
        if value.dtype == _HALF:
            value.type = ir.TensorType(_FLOAT)
    return model


class InFloat32:
    """A backend that computes in float32 what graphs for `target` compute in half precision; the rest of the contract
    stays as it is. `folder` takes the graphs that are opened."""

    name = "cpu"

    def __init__(self, target: str, folder: Path, threads: int | None = None):
        self.target, self._folder, self._backend = target, folder, OnnxRuntimeCpu(threads, target)

    def open(self, path: Path, variant: Variant) -> Session:
        """The graph's twin in float32."""
        self._folder.mkdir(parents=True, exist_ok=True)
        twin = self._folder / path.name
        ir.save(in_float32(ir.load(path)), twin, external_data=f"{twin.name}.data")
        return _Widening(self._backend.open(twin, variant))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """As the CPU's own backend."""
        return self._backend.allocate(shape, dtype)


class _Widening:
    """Feeds what is half as float32."""

    limits: Mapping[str, int] = {}

    def __init__(self, inner: Session):
        self._inner = inner

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._inner.bind(_widened(inputs), outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._inner.run(_widened(feeds))


def find_peaks(
    graph_file: Path,
    variant: Variant,
    backend: Backend,
    feeds: Feeds,
    folder: Path,
    begin: Callable[[int], None] = lambda runs: None,
    progress: Callable[[int], None] = lambda runs: None,
) -> dict[str, float]:
    """Run a half-precision graph over `feeds` in float32, piece by piece: the largest magnitude of every value that its
    nodes make in half, by name; infinity for one that is not finite.

    `begin` gets the number of runs, and `progress(1)` follows each. `folder` holds the piece at work.
    """
    model = ir.load(graph_file)
    half, nodes = half_values(model.graph), list(model.graph)
    own = [value.name or "" for value in model.graph.inputs]
    segments = cut(model.graph, _SEGMENT_BYTES)
    begin(len(segments) * len(feeds))
    peaks: dict[str, float] = {}
    passing: list[dict[str, np.ndarray]] = [{} for _ in range(len(feeds))]
    folder.mkdir(parents=True, exist_ok=True)
    for segment in segments:
        made = [v.name or "" for node in nodes[segment.start : segment.stop] for v in node.outputs if v in half]
        made = [name for name in made if name]
        types = {name: ir.DataType.from_numpy(passing[0][name].dtype) for name in segment.needs}
        part = _piece(model, segment, made, types)
        ir.save(part, folder / "piece.onnx", external_data="piece.onnx.data")
        session, inputs = backend.open(folder / "piece.onnx", variant), [v.name or "" for v in part.graph.inputs]
        for i in range(len(feeds)):
            values = {**_widened(feeds.read(i, own)), **passing[i]}
            if "logits_indices" in values:
                values["logits_indices"] = values["logits_indices"][:, -_ROWS:]
            outputs = session.run({name: values[name] for name in inputs})
            for name in made:
                peaks[name] = max(peaks.get(name, 0.0), _peak(outputs[name + _PEAK], outputs[name + _SUM]))
            passing[i] = {name: outputs[name] for name in segment.gives}
            progress(1)
    return peaks


def widen(model: ir.Model, values: Collection[str]) -> list[str]:
    """Let the operators that make or take the half-precision values called `values` compute in float32, with casts
    around them; `model` is changed in place. Returns the operators' names.

    Such a value must not be an output of the graph, whose types are a contract.
    """
    graph = model.graph
    half = half_values(graph)
    beyond = {v for v in half if v.name in values}
    chosen = [n for n in graph if not beyond.isdisjoint((*n.inputs, *n.outputs))]
    cast = _Casts(graph)
    for node in chosen:
        for i, value in enumerate(node.inputs):
            if value is not None and value in half and value not in beyond:
                node.replace_input_with(i, cast.up(value, node))
        if node.op_type == "Cast" and node.outputs[0] in beyond:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
        for value in node.outputs:
            if value in beyond:
                value.type = ir.TensorType(_FLOAT)
            elif value in half and node.op_type != "Cast" and value.name:
                half.add(cast.down(value, node))
    return [node.name or "" for node in chosen]


class _Casts:
    """Casts that are put into a graph, each made once."""

    def __init__(self, graph: ir.Graph):
        self._graph = graph
        self._wide: dict[ir.Value, ir.Value] = {}

    def up(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """`value` in float32, for `reader` and those behind it."""
        if value not in self._wide:
            self._wide[value] = self._constant(value) or self._cast(value, reader)
        return self._wide[value]

    def down(self, value: ir.Value, maker: ir.Node) -> ir.Value:
        """What all readers of `value`, which is float32 from now on, read in its place: it in half precision."""
        name, readers = value.name, list(value.uses())
        value.name, value.type = f"{name}.float32", ir.TensorType(_FLOAT)
        narrow = ir.node("Cast", [value], {"to": int(_HALF)}, name=f"{name}.narrowed")
        result = narrow.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(_HALF), value.shape
        self._graph.insert_after(maker, narrow)
        for reader, index in readers:
            reader.replace_input_with(index, result)
        for i, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[i] = result
        self._wide[result] = value
        return result

    def _constant(self, value: ir.Value) -> ir.Value | None:
        """A vector or number, stored once more in float32: TensorRT wants scales as constants."""
        stored, name = value.const_value, f"{value.name}{IN_FLOAT32}"
        if not value.is_initializer() or stored is None or len(stored.shape) > 1:
            return None
        if name not in self._graph.initializers:
            wide = ir.tensor(stored.numpy().astype(np.float32), name=name)
            self._graph.register_initializer(ir.val(name, const_value=wide))
        return self._graph.initializers[name]

    def _cast(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        widened = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{value.name}.widened")
        widened.outputs[0].name = f"{value.name}.widened"
        widened.outputs[0].type = ir.TensorType(_FLOAT)
        self._graph.insert_before(reader, widened)
        return widened.outputs[0]


def _piece(model: ir.Model, segment: Segment, record: list[str], types: Mapping[str, ir.DataType]) -> ir.Model:
    """The piece in float32; it also gives peak and sum of the magnitudes of the values in `record`."""
    part = in_float32(extract(model, segment, record, types))
    graph = part.graph
    for value in [v for v in graph.outputs if v.name in record]:
        magnitude = ir.node("Abs", [value], name=f"{value.name}.magnitude")
        graph.append(magnitude)
        for kind, ending in (("ReduceMax", _PEAK), ("ReduceSum", _SUM)):
            node = ir.node(kind, magnitude.outputs, {"keepdims": 0}, name=f"{value.name}{ending}")
            node.outputs[0].name, node.outputs[0].type = f"{value.name}{ending}", ir.TensorType(_FLOAT)
            graph.append(node)
            graph.outputs.append(node.outputs[0])
        if value.name not in segment.gives:
            graph.outputs.remove(value)
    return part


def _peak(peak: np.ndarray, total: np.ndarray) -> float:
    """NaN hides from a maximum, never from a sum."""
    return float(peak) if np.isfinite(total) else float("inf")


def _widened(feeds: Mapping[str, Any]) -> dict[str, Any]:
    arrays = {name: getattr(value, "array", value) for name, value in feeds.items()}
    return {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in arrays.items()}
