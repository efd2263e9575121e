"""A float graph with its linear layers in other precisions, as a recipe says and calibration found."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.findings import Findings, LayerFindings
from mllm_edge.calibration.int8_cache import quantize_cache
from mllm_edge.calibration.linears import Group, Layer, find_groups, find_layers
from mllm_edge.calibration.overflow import IN_FLOAT32, half_values
from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.gate import check_cuda_graph, check_graph
from mllm_edge.graph.int8_attention import OPSET, quantize_attention
from mllm_edge.graph.linear import (
    Linear,
    Quantized,
    by_weights,
    keeps_activations,
    linear,
    quantized_input,
    quantized_rows,
    to_float,
)
from mllm_edge.graph.precision import Precision

__all__ = ["requantize"]


def requantize(
    model: ir.Model,
    dialect: str,
    precision: Callable[[str], Precision],
    findings: Findings,
    data: DataSink,
    int8_attention: bool = False,
) -> ir.Model:
    """`model`, changed in place: its weights are written to `data` in the forms that `precision(layer name)` asks for;
    its cache becomes int8 where `findings` hold ranges of it, and the products of its attention if asked for (`contrib`
    in float32 alone).

    Raises OverflowError where a weight does not fit half precision, ExportError for an operator that the dialect does
    not have.
    """
    graph = model.graph
    layers = find_layers(graph)
    groups = find_groups(layers)
    half = half_values(graph)
    _write_others(graph, layers, findings, data)
    opset = graph.opset_imports[""]
    for group in groups:
        # Where half precision would overflow, operators of a half graph compute in float32.
        kind = ir.DataType.FLOAT16 if group.x in half else ir.DataType.FLOAT
        new = partial(GraphBuilder, graph.name or "", opset, data, kind, contrib=dialect == "contrib")
        found = {layer.name: findings.layer(layer.name) for layer in group.layers}
        before = new()
        quantized = _quantize_input(graph, group, found, precision, before)
        opset = max(opset, before.opset)
        for layer in group.layers:
            builder = new()
            chosen = precision(layer.name)
            described = _describe(layer, found[layer.name], chosen, quantized.get(_activation(chosen)))
            result = linear(builder, layer.x, described, chosen)
            *rest, last = layer.nodes
            builder.splice(graph, last, result, rest)
            opset = max(opset, builder.opset)
    if int8_attention:
        quantize_attention(graph, data)
        opset = max(opset, OPSET)
    graph.opset_imports[""] = opset
    quantize_cache(graph, dialect, findings)
    if dialect == "contrib":
        graph.opset_imports["com.microsoft"] = 1
        if any(value.dtype == ir.DataType.FLOAT16 for value in graph.inputs):
            check_cuda_graph(model)
    else:
        check_graph(model, dialect)
    return model


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
        read = partial(_scaled, name, stored, factors.get(name.removesuffix(IN_FLOAT32)))
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
) -> dict[str, Quantized]:
    """The group's input in 8 bits, once for all of its layers that take it so, by the kind of its codes."""
    quantized: dict[str, Quantized] = {}
    if keeps_activations(builder):
        return quantized
    for layer in group.layers:
        chosen, own = precision(layer.name), found[layer.name]
        kind = _activation(chosen)
        # The CPU's kernels for blocks take floats, and quantize them themselves.
        if kind and kind not in quantized and not (builder.contrib and chosen.in_blocks):
            if chosen.per_token:
                quantized[kind] = quantized_rows(builder, group.x, layer.name, chosen.kind == "fp8")
                continue
            assert own is not None
            assert own.input_range is not None
            quantized[kind] = quantized_input(builder, group.x, layer.name, own.input_range, chosen.kind == "fp8")
    if quantized:
        builder.insert(graph, group.layers[0].nodes[0])
    return quantized


def _activation(precision: Precision) -> str:
    """What the activations become, where nodes of the graph quantize them; else empty."""
    kind = {"int8_static": "int8", "w4a8": "int8", "fp8": "fp8"}.get(precision.kind, "")
    return f"{kind} by rows" if precision.per_token else kind


def _describe(layer: Layer, found: LayerFindings | None, precision: Precision, quantized: Quantized | None) -> Linear:
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
        rounding=by_weights(precision) if found is None else found,
        quantized=quantized,
    )
