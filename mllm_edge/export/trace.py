"""Trace a thin torch module on fake tensors, then lower its placeholders and stream its weights in."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.vision.modules import DOMAIN
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.dialects.known import DIALECTS
from mllm_edge.graph.gate import check_cuda_graph, check_graph
from mllm_edge.graph.int8_attention import quantize_attention
from mllm_edge.graph.linear import Linear, linear, to_float
from mllm_edge.graph.precision import Precision

__all__ = ["lower", "trace"]

_OPSET = 20  # of the traced graph: the first with Gelu; ONNX Runtime ≥ 1.18, TensorRT ≥ 10.3
# Two is the smallest size that the tracer does not take for a constant.
_SIZE = 2
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
        symbols = {d for spec in component.inputs for d in spec.shape if isinstance(d, str)}
        sizes = {symbol: torch.export.Dim(symbol) for symbol in symbols}
        examples = tuple(
            torch.empty(
                [_SIZE * (component.all_ranges[d].least or 1) if isinstance(d, str) else d for d in spec.shape],
                dtype=dtype if spec.dtype == "float32" else getattr(torch, spec.dtype),
            )
            for spec in component.inputs
        )
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            input_names=[spec.name for spec in component.inputs],
            output_names=[spec.name for spec in component.outputs],
            dynamic_shapes=tuple(
                {axis: sizes[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)} for spec in component.inputs
            ),
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
    int8_attention: bool = False,
) -> ir.Model:
    """A copy of the graph that was traced in `float_type`, in `dialect`, its weights written to `data` as they are
    needed; attention in 8-bit products if asked for (`contrib` in float32 alone). Raises ExportError for an operator
    that the dialect does not have."""
    model = traced.clone()
    graph = model.graph
    sources = _sources(component, weights)
    _bind_plain_weights(graph, sources, data, float_type)
    opset = DIALECTS[dialect].vision_opset
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        builder = GraphBuilder(component.name, opset, data, float_type, contrib=dialect == "contrib")
        x = node.inputs[0]
        assert x is not None
        if node.op_type == "Linear":
            result = linear(builder, x, _linear(node, sources), precision)
        elif node.op_type == "RmsNorm":
            scale, name = node.inputs[1], f"{node.outputs[0].name or 'norm'}"
            assert scale is not None
            eps = node.attributes["epsilon"].as_float()
            result = DIALECTS[dialect].vision_norm(builder, name, x, scale, eps)
        else:
            result = _attention(builder, node, dialect)
        builder.splice(graph, node, result)
        opset = max(opset, builder.opset)
    if int8_attention:
        quantize_attention(graph, data)
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


def _attention(builder: GraphBuilder, node: ir.Node, dialect: str) -> ir.Value:
    name = f"{node.outputs[0].name or 'attention'}"
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) == 1:  # q, k and v side by side
        inputs = list(builder.nodes("Split", inputs, f"{name}.qkv", outputs=3, axis=-1, num_outputs=3))
        packed = node.inputs[0].shape if node.inputs[0] is not None else None
        assert packed is not None
        width = packed[-1]
        assert isinstance(width, int)
        for part in inputs:
            part.type, part.shape = ir.TensorType(builder.float_type), ir.Shape([*packed[:-1], width // 3])
    query, key, value, *bias = inputs
    heads, scale = node.attributes["heads"].as_int(), node.attributes["scale"].as_float()
    where = builder, name, heads, scale
    return DIALECTS[dialect].vision_attention(*where, query, key, value, bias[0] if bias else None)


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
