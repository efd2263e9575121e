"""A float graph with its linear layers in other precisions, as a recipe says and calibration found."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.findings import Findings, LayerFindings
from mllm_edge.calibration.layers import Group, Layer, find_groups, find_layers
from mllm_edge.calibration.methods import rtn
from mllm_edge.calibration.qdq import Linear, keeps_activations, linear, quantized_input, to_float
from mllm_edge.calibration.recipes import Precision
from mllm_edge.export.datafile import DataSink
from mllm_edge.export.gate import check_cuda_graph, check_graph
from mllm_edge.export.graph import GraphBuilder

__all__ = ["requantize"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def requantize(
    model: ir.Model, dialect: str, precision: Callable[[str], Precision], findings: Findings, data: DataSink
) -> ir.Model:
    """`model`, changed in place: its weights are written to `data` in the forms that `precision(layer name)` asks for.

    Raises OverflowError where a weight does not fit half precision, ExportError for an operator that the dialect does
    not have.
    """
    graph = model.graph
    layers = find_layers(graph)
    groups = find_groups(layers)
    float_type = _float_type(graph)
    _write_others(graph, layers, findings, data)
    opset = graph.opset_imports[""]
    new = lambda: GraphBuilder(graph.name or "", opset, data, float_type, contrib=dialect == "contrib")  # noqa: E731
    for group in groups:
        found = {layer.name: findings.layer(layer.name) for layer in group.layers}
        quantized = _quantize_input(graph, group, found, precision, new())
        for layer in group.layers:
            builder = new()
            chosen = precision(layer.name)
            described = _describe(layer, found[layer.name], quantized if chosen.kind == "int8_static" else None)
            result = linear(builder, layer.x, described, chosen)
            *before, last = layer.nodes
            builder.splice(graph, last, result, before)
            opset = max(opset, builder.opset)
    graph.opset_imports[""] = opset
    if dialect == "contrib":
        graph.opset_imports["com.microsoft"] = 1
        if float_type != ir.DataType.FLOAT:
            check_cuda_graph(model)
    else:
        check_graph(model, dialect)
    return model


def _float_type(graph: ir.Graph) -> ir.DataType:
    return next(value.dtype for value in graph.inputs if value.dtype in _FLOATS)


def _write_others(graph: ir.Graph, layers: list[Layer], findings: Findings, data: DataSink) -> None:
    """Every stored tensor that is not of a linear layer, times the factors that calibration put into it."""
    factors = findings.tensor_factors()
    own = {value for layer in layers for value in (layer.weight, layer.bias) if value is not None}
    for name, value in list(graph.initializers.items()):
        if value in own:
            del graph.initializers[name]
            continue
        stored = value.const_value
        assert stored is not None
        read = partial(_scaled, name, stored, factors.get(name))
        value.const_value = data.add(name, stored.dtype, tuple(stored.shape.numpy()), read)


def _scaled(name: str, stored: ir.TensorProtocol, factors: np.ndarray | None) -> np.ndarray:
    array = stored.numpy()
    if factors is None:
        return array
    return to_float(name, array.astype(np.float32) * factors, stored.dtype)


def _quantize_input(
    graph: ir.Graph,
    group: Group,
    found: dict[str, LayerFindings | None],
    precision: Callable[[str], Precision],
    builder: GraphBuilder,
) -> ir.Value | None:
    """The group's input in 8 bits, once for all of its layers that take it so."""
    takers = [layer for layer in group.layers if precision(layer.name).kind == "int8_static"]
    if not takers or keeps_activations(builder):
        return None
    first = found[takers[0].name]
    assert first is not None
    assert first.input_range is not None
    quantized = quantized_input(builder, group.x, takers[0].name, first.input_range)
    builder.insert(graph, takers[0].nodes[0])
    return quantized


def _describe(layer: Layer, found: LayerFindings | None, quantized: ir.Value | None) -> Linear:
    """The layer for the writer, factors included."""
    columns = None if found is None else found.factors
    rows = None if found is None else found.row_factors

    def weight() -> np.ndarray:
        array = layer.read_weight()
        array = array if rows is None else array * rows[:, None]
        return array if columns is None else array * columns

    def bias() -> np.ndarray:
        return layer.read_bias() if rows is None else layer.read_bias() * rows

    return Linear(
        name=layer.name,
        shape=layer.shape,
        weight=weight,
        bias=None if layer.bias is None else bias,
        rounding=rtn if found is None else found,
        quantized=quantized,
        input_range=None if found is None else found.input_range,
    )
