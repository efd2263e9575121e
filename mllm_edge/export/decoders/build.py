"""Graphs of decoders, of text encoders before them and of cross-attention's keys and values, in any dialect."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.recipes import Recipe
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.layers import Layers, Stream
from mllm_edge.graph import operators
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.decoder_spec import CrossSpec, DecoderSpec, EncoderSpec
from mllm_edge.graph.dialects.base import Dialect
from mllm_edge.graph.dialects.known import DIALECTS
from mllm_edge.graph.gate import check_cuda_graph, check_graph
from mllm_edge.graph.linear import linear
from mllm_edge.spec import CROSS_BIAS, CROSS_KV, CROSS_ROWS, DEEPSTACK, ENCODED, cross_names

__all__ = ["build_cross_kv", "build_decoder", "build_text_encoder"]

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64
# Added to the logits of tokens that are never chosen: within half precision's range.
_BANNED = -30000.0


def build_decoder(
    spec: DecoderSpec,
    weights: Weights,
    recipe: Recipe,
    data: DataSink,
    dialect: str = "contrib",
    float_type: ir.DataType = _FLOAT,
) -> ir.Model:
    """Write the decoder's weights to `data`, one tensor at a time, and return its graph in `dialect`.

    `float_type` is that of hidden states and caches. Raises ExportError for a float type that the dialect has no
    kernels for, or a spec that it cannot express.
    """
    ops: Dialect = DIALECTS[dialect]("decoder", data, float_type)
    graph, layers = ops.graph, Layers(ops, spec, weights, recipe)
    stream = Stream(ops, graph.input("inputs_embeds", float_type, ("batch", "sequence", spec.hidden_size)))
    indices = graph.input("logits_indices", _INT64, ("batch", "rows"))
    ops.decoder_inputs(spec)
    inputs = _optional_inputs(ops, spec)
    if spec.names.input_norm is not None:
        stream.pending, _ = stream.normed("input_norm", layers.stream_norm(spec.names.input_norm))
    for i, layer in enumerate(spec.stack):
        for branch in layer.branches:
            layers.branch(stream, i, layer, branch, inputs)
        if i in spec.deepstack:
            stream.pending = graph.node("Add", [stream.pending, inputs[f"{DEEPSTACK}{i}"]], f"layers.{i}.deepstack")
    # Rows are picked before the last norm: prefill projects one row, not all of them.
    stream.pick(indices)
    head = layers.linear(
        "lm_head", [spec.names.lm_head], [spec.vocab_size], spec.hidden_size, _head_bias(spec, weights) or False
    )
    logits = graph.cast(
        linear(graph, _last_hidden(layers, stream, ops, spec), head, recipe.head), _FLOAT, "logits.float"
    )
    if spec.logits_cap is not None:
        logits = operators.softcap(graph, "logits.capped", logits, spec.logits_cap, _FLOAT)
    ops.decoder_outputs(logits)
    for state in spec.state_specs():
        if state.kind == "recurrent":
            for value, name in zip(layers.recurrent, state.outputs, strict=True):
                graph.output(value, name, float_type, ("batch", *state.shape))
    return _finish(ops, dialect)


def build_text_encoder(
    spec: EncoderSpec,
    weights: Weights,
    recipe: Recipe,
    data: DataSink,
    dialect: str = "contrib",
    float_type: ir.DataType = _FLOAT,
) -> ir.Model:
    """inputs_embeds [B, S, H] T and attention_bias [B, 1 or heads, S, S] T → encoder_hidden_states [B, S, H] T."""
    ops: Dialect = DIALECTS[dialect]("text_encoder", data, float_type)
    graph, layers = ops.graph, Layers(ops, spec, weights, recipe)
    stream = Stream(ops, graph.input("inputs_embeds", float_type, ("batch", "sequence", spec.hidden_size)))
    shape = ("batch", spec.heads_in_bias, "sequence", "sequence")
    inputs = {"attention_bias": graph.input("attention_bias", float_type, shape)}
    if spec.names.input_norm is not None:
        stream.pending, _ = stream.normed("input_norm", layers.stream_norm(spec.names.input_norm))
    for i, layer in enumerate(spec.stack):
        for branch in layer.branches:
            layers.branch(stream, i, layer, branch, inputs)
    hidden = _last_hidden(layers, stream, ops, spec)
    graph.output(hidden, ENCODED, float_type, ("batch", "sequence", spec.hidden_size))
    return _finish(ops, dialect)


def build_cross_kv(
    spec: DecoderSpec,
    weights: Weights,
    recipe: Recipe,
    data: DataSink,
    dialect: str = "contrib",
    float_type: ir.DataType = _FLOAT,
) -> ir.Model:
    """encoder_hidden_states [B, N, features] T → cross.{l}.key and .value [B, Hkv, N, D] T, for every layer that has
    cross-attention. Constant while one image (or text) is talked about: it runs once."""
    assert spec.cross is not None, "this decoder has no cross-attention"
    ops: Dialect = DIALECTS[dialect](CROSS_KV, data, float_type)
    graph, layers = ops.graph, Layers(ops, spec, weights, recipe)
    features = graph.input(ENCODED, float_type, ("batch", "features", spec.cross.features))
    numbered = [i for i, layer in enumerate(spec.stack) if layer.has("cross_attention")]
    for number, i in enumerate(numbered):
        for name, value in zip(cross_names(number), layers.cross_kv(i, features), strict=True):
            graph.output(value, name, float_type, _cross_shape(spec.cross))
    return _finish(ops, dialect)


def _optional_inputs(ops: Dialect, spec: DecoderSpec) -> dict[str, ir.Value]:
    """The inputs that only some decoders have."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    if spec.cross is not None:
        names = [name for layer in range(spec.crossed) for name in cross_names(layer)]
        shapes |= dict.fromkeys(names, _cross_shape(spec.cross))
        shapes[CROSS_BIAS] = ("batch", 1, "sequence", "features")
        if spec.cross.rows:
            shapes[CROSS_ROWS] = ("batch", "sequence", 1)
    for state in spec.state_specs():
        if state.kind == "recurrent":
            shapes |= dict.fromkeys(state.inputs, ("batch", *state.shape))
    shapes |= {f"{DEEPSTACK}{k}": ("batch", "sequence", spec.hidden_size) for k in spec.deepstack}
    return {name: ops.graph.input(name, ops.graph.float_type, shape) for name, shape in shapes.items()}


def _cross_shape(cross: CrossSpec) -> tuple[int | str, ...]:
    return ("batch", cross.attention.kv_heads, "features", cross.attention.head_dim)


def _last_hidden(layers: Layers, stream: Stream, ops: Dialect, spec: DecoderSpec | EncoderSpec) -> ir.Value:
    """The stream behind the last layer, normalized if the model does so, in the graph's float type."""
    factor = spec.head_scale if isinstance(spec, DecoderSpec) else 1.0
    if spec.names.final_norm is not None:
        return stream.normed("final_norm", layers.stream_norm(spec.names.final_norm, factor))[0]
    assert factor == 1, "a scale is folded into the last norm"
    return stream.total("hidden.last")


def _head_bias(spec: DecoderSpec, weights: Weights) -> Callable[[], np.ndarray] | None:
    """What is added to the logits, [V]: the checkpoint's own vector, stored [1, V], and the ban."""
    if spec.head_bias is None and not spec.banned:
        return None
    stored = weights.use(spec.head_bias, (1, spec.vocab_size)) if spec.head_bias is not None else None

    def read() -> np.ndarray:
        vector = stored()[0] if stored is not None else np.zeros(spec.vocab_size, np.float32)
        vector[list(spec.banned)] = _BANNED
        return vector

    return read


def _finish(ops: Dialect, dialect: str) -> ir.Model:
    model = ops.graph.model()
    if not ops.graph.contrib:
        check_graph(model, dialect)
    elif ops.graph.float_type != _FLOAT:
        check_cuda_graph(model)
    return model
