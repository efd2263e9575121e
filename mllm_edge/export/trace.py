"""Trace a thin torch module on fake tensors, then lower its placeholders and stream its weights in."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.qdq import Linear, linear
from mllm_edge.calibration.recipes import Precision
from mllm_edge.export.datafile import DataSink
from mllm_edge.export.graph import MICROSOFT, GraphBuilder
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.safetensors import Weights
from mllm_edge.export.vision.layers import DOMAIN

__all__ = ["lower", "trace"]

_OPSET = 20  # the first with Gelu; ONNX Runtime ≥ 1.18
_FLOAT = ir.DataType.FLOAT
Reader = Callable[[], np.ndarray]


def trace(component: TracedComponent) -> ir.Model:
    """The module as a graph whose initializers have shapes but no data; no weight is allocated."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        module = component.module().eval()
        # Two is the smallest size that the tracer does not take for a constant.
        examples = tuple(
            torch.empty([2, *(int(d) for d in spec.shape[1:])], dtype=getattr(torch, spec.dtype))
            for spec in component.inputs
        )
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


def lower(
    component: TracedComponent, traced: ir.Model, weights: Weights, precision: Precision, data: DataSink
) -> ir.Model:
    """A copy of the traced graph in the `contrib` dialect, its weights written to `data` as they are needed."""
    model = traced.clone()
    graph = model.graph
    sources = _sources(component, weights)
    _bind_plain_weights(graph, sources, data)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        builder = GraphBuilder(component.name, _OPSET, data, contrib=True)
        x = node.inputs[0]
        assert x is not None
        if node.op_type == "Linear":
            result = linear(builder, x, _linear(node, sources), precision)
        else:
            result = _attention(builder, x, node)
        builder.splice(graph, node, result)
    graph.opset_imports.pop(DOMAIN, None)
    graph.opset_imports[MICROSOFT] = 1
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


def _bind_plain_weights(graph: ir.Graph, source: Callable[[ir.Value], Reader], data: DataSink) -> None:
    """Fill the initializers that ordinary operators read (norms, convolutions, positions), drop the placeholders'."""
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        if any(node.domain != DOMAIN for node, _ in value.uses()):
            value.const_value = data.add(name, _FLOAT, _shape(value), source(value))
            graph.register_initializer(value)


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


def _attention(builder: GraphBuilder, qkv: ir.Value, node: ir.Node) -> ir.Value:
    name = node.outputs[0].name or "attention"
    query, key, value = builder.nodes("Split", [qkv], f"{name}.qkv", outputs=3, axis=-1, num_outputs=3)
    heads = node.attributes["heads"].as_int()
    return builder.node("MultiHeadAttention", [query, key, value], f"{name}.heads", MICROSOFT, num_heads=heads)


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
