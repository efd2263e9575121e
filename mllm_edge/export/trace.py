"""Trace a thin torch module on fake tensors, then lower its placeholders and stream its weights in."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.vision.modules import DOMAIN
from mllm_edge.graph import operators
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.gate import check_cuda_graph, check_graph
from mllm_edge.graph.linear import Linear, linear, to_float
from mllm_edge.graph.precision import Precision

__all__ = ["lower", "trace"]

_OPSET = 20  # of the traced graph: the first with Gelu; ONNX Runtime ≥ 1.18, TensorRT ≥ 10.3
_OPSETS = {"contrib": _OPSET, "opset24": 24, "opset17": _OPSET}
_FLOAT = ir.DataType.FLOAT
Reader = Callable[[], np.ndarray]


def trace(component: TracedComponent, float_type: ir.DataType = _FLOAT) -> ir.Model:
    """The module as a graph in `float_type` whose initializers have shapes but no data; no weight is allocated."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        dtype = getattr(torch, float_type.numpy().name)
        module = _module(component, dtype)
        # Two is the smallest size that the tracer does not take for a constant.
        examples = tuple(torch.empty([2, *(int(d) for d in spec.shape[1:])], dtype=dtype) for spec in component.inputs)
        batch = torch.export.Dim(str(component.inputs[0].shape[0]))
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            input_names=[spec.name for spec in component.inputs],
            output_names=[spec.name for spec in component.outputs],
            dynamic_shapes=tuple({0: batch} for _ in examples),
            opset_version=_OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _forget_origin(program.model)
    return program.model


def _module(component: TracedComponent, dtype: Any) -> Any:
    """The module with parameters of that type. Fake parameters cannot be converted: they are made so."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return component.module().eval()
    finally:
        torch.set_default_dtype(before)


def lower(
    component: TracedComponent,
    traced: ir.Model,
    weights: Weights,
    precision: Precision,
    data: DataSink,
    dialect: str = "contrib",
    float_type: ir.DataType = _FLOAT,
) -> ir.Model:
    """A copy of the graph that was traced in `float_type`, in `dialect`, its weights written to `data` as they are
    needed. Raises ExportError for an operator that the dialect does not have."""
    model = traced.clone()
    graph = model.graph
    sources = _sources(component, weights)
    _bind_plain_weights(graph, sources, data, float_type)
    opset = _OPSETS[dialect]
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        builder = GraphBuilder(component.name, opset, data, float_type, contrib=dialect == "contrib")
        x = node.inputs[0]
        assert x is not None
        if node.op_type == "Linear":
            result = linear(builder, x, _linear(node, sources), precision)
        elif node.op_type == "RmsNorm":
            result = _rms_norm(builder, x, node, dialect)
        else:
            result = _ATTENTION[dialect](builder, x, node)
        builder.splice(graph, node, result)
        opset = max(opset, builder.opset)
    graph.opset_imports.pop(DOMAIN, None)
    graph.opset_imports[""] = opset
    if dialect == "contrib":
        graph.opset_imports[MICROSOFT] = 1
        if float_type != _FLOAT:
            check_cuda_graph(model)
    else:
        check_graph(model, dialect)
    graph.name = component.name
    model.producer_name, model.producer_version = "mllm-edge", None
    return model


def _sources(component: TracedComponent, weights: Weights) -> Callable[[ir.Value], Reader]:
    derived: Mapping[str, Reader] = component.derived

    def source(value: ir.Value) -> Reader:
        assert value.name is not None
        if value.name in derived:
            return derived[value.name]
        return weights.use(component.prefix + value.name, _shape(value))

    return source


def _bind_plain_weights(
    graph: ir.Graph, source: Callable[[ir.Value], Reader], data: DataSink, dtype: ir.DataType
) -> None:
    """Fill the initializers that ordinary operators read (norms, convolutions, positions), drop the placeholders'."""
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        if any(node.domain != DOMAIN or node.op_type == "RmsNorm" for node, _ in value.uses()):
            read = source(value)
            value.const_value = data.add(name, dtype, _shape(value), partial(_in_type, name, read, dtype))
            graph.register_initializer(value)


def _in_type(name: str, read: Reader, dtype: ir.DataType) -> np.ndarray:
    return to_float(name, read(), dtype)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _linear(node: ir.Node, source: Callable[[ir.Value], Reader]) -> Linear:
    parts = node.attributes["parts"].as_int()
    values = [v for v in node.inputs[1:] if v is not None]
    weights, biases = values[:parts], values[parts:]
    readers = [source(w) for w in weights]
    bias_readers = [source(b) for b in biases]
    shapes = [_shape(w) for w in weights]
    first = weights[0].name or ""
    name = first.removesuffix(".weight") if parts == 1 else first.rsplit(".", 2)[0] + ".qkv_proj"
    return Linear(
        name,
        (sum(rows for rows, _ in shapes), shapes[0][1]),
        lambda: np.concatenate([r() for r in readers]),
        (lambda: np.concatenate([r() for r in bias_readers])) if biases else None,
    )


def _rms_norm(builder: GraphBuilder, x: ir.Value, node: ir.Node, dialect: str) -> ir.Value:
    name, eps, scale = f"{node.outputs[0].name or 'norm'}", node.attributes["epsilon"].as_float(), node.inputs[1]
    assert scale is not None
    if dialect != "opset17":
        op = "SimplifiedLayerNormalization" if dialect == "contrib" else "RMSNormalization"
        return builder.node(op, [x, scale], name, epsilon=eps, axis=-1)
    half = builder.float_type != _FLOAT
    wide = builder.node("Cast", [x], f"{name}.wide", to=_FLOAT) if half else x
    normed = operators.rms_normed(builder, name, wide, eps)
    narrow = builder.node("Cast", [normed], f"{name}.narrow", to=builder.float_type) if half else normed
    return builder.node("Mul", [narrow, scale], name)


def _contrib_attention(builder: GraphBuilder, qkv: ir.Value, node: ir.Node) -> ir.Value:
    name, heads = _attention_of(node)
    query, key, value = _split(builder, qkv, name)
    return builder.node("MultiHeadAttention", [query, key, value], f"{name}.heads", MICROSOFT, num_heads=heads)


def _fused_attention(builder: GraphBuilder, qkv: ir.Value, node: ir.Node) -> ir.Value:
    """Standard Attention, which needs its scale: TensorRT has no default."""
    name, heads = _attention_of(node)
    parts = [_heads(builder, x, f"{name}.{p}", heads) for x, p in zip(_split(builder, qkv, name), "qkv", strict=True)]
    total = builder.node("Attention", parts, f"{name}.heads", scale=_head_size(qkv, heads) ** -0.5)
    return operators.merge_heads(builder, name, operators.heads_first(builder, f"{name}.rows", total))


def _plain_attention(builder: GraphBuilder, qkv: ir.Value, node: ir.Node) -> ir.Value:
    """Matrix products and a softmax."""
    name, heads = _attention_of(node)
    query, key, value = (
        _heads(builder, x, f"{name}.{p}", heads) for x, p in zip(_split(builder, qkv, name), "qkv", strict=True)
    )
    columns = builder.node("Transpose", [key], f"{name}.columns", perm=[0, 1, 3, 2])
    # The query is scaled, not the scores: there are more of them, and half precision keeps the smaller products.
    query = operators.times(builder, f"{name}.scaled", query, _head_size(qkv, heads) ** -0.5)
    scores = builder.node("MatMul", [query, columns], f"{name}.scores")
    weights = builder.node("Softmax", [scores], f"{name}.weights", axis=-1)
    total = builder.node("MatMul", [weights, value], f"{name}.total")
    return operators.merge_heads(builder, name, operators.heads_first(builder, f"{name}.rows", total))


_ATTENTION = {"contrib": _contrib_attention, "opset24": _fused_attention, "opset17": _plain_attention}


def _attention_of(node: ir.Node) -> tuple[str, int]:
    return f"{node.outputs[0].name or 'attention'}", node.attributes["heads"].as_int()


def _split(builder: GraphBuilder, qkv: ir.Value, name: str) -> Sequence[ir.Value]:
    return builder.nodes("Split", [qkv], f"{name}.qkv", outputs=3, axis=-1, num_outputs=3)


def _heads(builder: GraphBuilder, x: ir.Value, name: str, heads: int) -> ir.Value:
    """[N, S, D] → [N, heads, S, D/heads]."""
    return operators.heads_first(builder, f"{name}.heads", operators.reshape(builder, name, x, (0, 0, heads, -1)))


def _head_size(qkv: ir.Value, heads: int) -> int:
    assert qkv.shape is not None
    width = qkv.shape[-1]
    assert isinstance(width, int)
    return width // (3 * heads)


def _forget_origin(model: ir.Model) -> None:
    """Remove what the tracer notes about source files: it is of no use on a device and tells paths of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


class _quiet_exporter:
    """The exporter logs about operators of packages that are not installed; nothing here needs them."""

    def __enter__(self) -> None:
        import logging

        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
