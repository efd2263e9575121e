"""The layers of a decoder, written once; a dialect supplies the operators (and documents its contract)."""

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.qdq import Linear, linear, to_float
from mllm_edge.calibration.recipes import Recipe
from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.dialect import Dialect, Norm
from mllm_edge.export.decoder.dialects.contrib import Contrib
from mllm_edge.export.decoder.dialects.opset17 import Opset17
from mllm_edge.export.decoder.dialects.opset24 import Opset24
from mllm_edge.export.decoder.spec import DecoderSpec, NormSpec
from mllm_edge.export.gate import check_graph
from mllm_edge.export.safetensors import Weights

__all__ = ["DIALECTS", "build_decoder"]

DIALECTS: dict[str, type[Contrib] | type[Opset24] | type[Opset17]] = {
    "contrib": Contrib,
    "opset24": Opset24,
    "opset17": Opset17,
}


def build_decoder(
    spec: DecoderSpec,
    weights: Weights,
    recipe: Recipe,
    data: DataSink,
    dialect: str = "contrib",
    float_type: ir.DataType = ir.DataType.FLOAT,
    capacity: int | None = None,
) -> ir.Model:
    """Write the decoder's weights to `data`, one tensor at a time, and return its graph in `dialect`.

    `float_type` is that of hidden states and caches; `capacity` fixes the length of in-place caches.
    Raises ExportError for a float type that the dialect has no kernels for.
    """
    ops: Dialect = DIALECTS[dialect](spec, data, float_type, capacity)
    layers = _Layers(ops, spec, weights, recipe)
    hidden, residual = ops.inputs_embeds, None
    for i in range(spec.layers):
        normed, residual = ops.norm(f"layers.{i}.input_norm", layers.norm(i, "input_norm"), hidden, residual)
        attended = layers.attention(i, normed)
        norm = layers.norm(i, "post_attention_norm")
        normed, residual = ops.norm(f"layers.{i}.post_attention_norm", norm, attended, residual)
        hidden = layers.mlp(i, normed)
    # Rows are picked before the last norm: prefill projects one row, not all of them.
    hidden = ops.pick_rows("hidden.rows", hidden)
    assert residual is not None
    residual = ops.pick_rows("residual.rows", residual)
    final = layers.norm_weights(spec.names.final_norm, spec.norm, spec.hidden_size)
    normed, _ = ops.norm("final_norm", final, hidden, residual)
    head = layers.linear("lm_head", [spec.names.lm_head], [spec.vocab_size], spec.hidden_size, bias=False)
    model = ops.finish(linear(ops.graph, normed, head, recipe.head))
    if not ops.graph.contrib:
        check_graph(model, dialect)
    return model


class _Layers:
    """The parts of one layer, with names `layers.N.part` in the graph."""

    def __init__(self, ops: Dialect, spec: DecoderSpec, weights: Weights, recipe: Recipe):
        self._ops, self._spec, self._weights, self._recipe = ops, spec, weights, recipe

    def norm(self, i: int, part: str) -> Norm:
        """The norm `part` of layer i."""
        return self.norm_weights(self._name(i, part), self._spec.norm, self._spec.hidden_size)

    def attention(self, i: int, x: ir.Value) -> ir.Value:
        """Packed q, k, v projection, attention over the cache, output projection."""
        spec = self._spec.attention
        rows = [n * spec.head_dim for n in (spec.heads, spec.kv_heads, spec.kv_heads)]
        names = [self._name(i, part) for part in ("q_proj", "k_proj", "v_proj")]
        qkv = self._project(x, f"layers.{i}.qkv_proj", names, rows, self._spec.hidden_size, spec.qkv_bias)
        attended = self._ops.attention(i, qkv, self._qk_norm(i))
        name = self._name(i, "o_proj")
        return self._project(
            attended, f"layers.{i}.o_proj", [name], [self._spec.hidden_size], rows[0], spec.output_bias
        )

    def mlp(self, i: int, x: ir.Value) -> ir.Value:
        """Gate and up stay apart: 2–3% faster than one product and a split."""
        spec, graph, hidden = self._spec.mlp, self._ops.graph, self._spec.hidden_size
        parts = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
        first, *up = (
            self._project(x, f"layers.{i}.{part}", [self._name(i, part)], [spec.inner], hidden, spec.bias)
            for part in parts
        )
        inner = self._ops.activation(f"layers.{i}.activation", spec.activation, first)
        if up:
            inner = graph.node("Mul", [inner, *up], f"layers.{i}.gated")
        down = [self._name(i, "down_proj")]
        return self._project(inner, f"layers.{i}.down_proj", down, [hidden], spec.inner, spec.bias)

    def norm_weights(self, name: str, spec: NormSpec, size: int) -> Norm:
        """A norm's scale and bias, [size] each, in the graph's float type."""
        bias = self._vector(f"{name}.bias", size) if spec.bias else None
        return Norm(spec, self._vector(f"{name}.weight", size), bias)

    def linear(self, name: str, sources: list[str], rows: list[int], row: int, bias: bool) -> Linear:
        """One layer whose weight is the `sources` stacked along the output axis."""
        parts = [self._weights.use(f"{s}.weight", (n, row)) for s, n in zip(sources, rows, strict=True)]
        biases = [self._weights.use(f"{s}.bias", (n,)) for s, n in zip(sources, rows, strict=True)] if bias else None
        return Linear(
            name,
            (sum(rows), row),
            lambda: np.concatenate([p() for p in parts]),
            (lambda: np.concatenate([b() for b in biases])) if biases else None,
        )

    def _vector(self, name: str, size: int) -> ir.Value:
        read, kind = self._weights.use(name, (size,)), self._ops.graph.float_type
        return self._ops.graph.weight(name, kind, (size,), lambda: to_float(name, read(), kind))

    def _qk_norm(self, i: int) -> tuple[Norm, Norm] | None:
        attention = self._spec.attention
        if attention.qk_norm is None:
            return None
        query, key = (
            self.norm_weights(self._name(i, part), attention.qk_norm, attention.head_dim)
            for part in ("q_norm", "k_norm")
        )
        return query, key

    def _project(self, x: ir.Value, name: str, sources: list[str], rows: list[int], row: int, bias: bool) -> ir.Value:
        return linear(self._ops.graph, x, self.linear(name, sources, rows, row, bias), self._recipe.decoder)

    def _name(self, i: int, part: str) -> str:
        return self._spec.names.layer[part].format(i=i)
