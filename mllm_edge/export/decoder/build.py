"""The layers of a decoder, written once; a dialect supplies the operators (and documents its contract)."""

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.qdq import Linear, linear
from mllm_edge.calibration.recipes import Recipe
from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.dialect import Dialect, Norms
from mllm_edge.export.decoder.dialects.contrib import Contrib
from mllm_edge.export.decoder.dialects.opset17 import Opset17
from mllm_edge.export.decoder.dialects.opset24 import Opset24
from mllm_edge.export.decoder.spec import DecoderSpec
from mllm_edge.export.safetensors import Weights

__all__ = ["DIALECTS", "build_decoder"]

DIALECTS = {"contrib": Contrib, "opset24": Opset24, "opset17": Opset17}


def build_decoder(
    spec: DecoderSpec, weights: Weights, recipe: Recipe, data: DataSink, dialect: str = "contrib"
) -> ir.Model:
    """Write the decoder's weights to `data`, one tensor at a time, and return its graph in `dialect`."""
    ops: Dialect = DIALECTS[dialect](spec, data)
    layers = _Layers(ops, spec, weights, recipe)
    hidden, residual = ops.inputs_embeds, None
    for i in range(spec.layers):
        normed, residual = layers.norm(i, "input_norm", hidden, residual)
        attended = layers.attention(i, normed)
        normed, residual = layers.norm(i, "post_attention_norm", attended, residual)
        hidden = layers.mlp(i, normed)
    # Rows are picked before the last norm: prefill projects one row, not all of them.
    hidden = ops.pick_rows("hidden.rows", hidden)
    assert residual is not None
    residual = ops.pick_rows("residual.rows", residual)
    normed, _ = ops.norm("final_norm", layers.norm_weight(spec.names.final_norm), hidden, residual)
    head = layers.linear("lm_head", [spec.names.lm_head], [spec.vocab_size], spec.hidden_size, bias=False)
    return ops.finish(linear(ops.graph, normed, head, recipe.head))


class _Layers:
    """The parts of one layer, with names `layers.N.part` in the graph."""

    def __init__(self, ops: Dialect, spec: DecoderSpec, weights: Weights, recipe: Recipe):
        self._ops, self._spec, self._weights, self._recipe = ops, spec, weights, recipe

    def norm(self, i: int, part: str, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """The sum of hidden and residual, normalized, and the sum itself."""
        return self._ops.norm(f"layers.{i}.{part}", self.norm_weight(self._name(i, part)), hidden, residual)

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
        """down(silu(gate(x)) · up(x)). Gate and up stay apart: 2–3% faster than one product and a split."""
        spec, graph = self._spec, self._ops.graph
        inner = [spec.intermediate_size]
        gate, up = (
            self._project(x, f"layers.{i}.{part}", [self._name(i, part)], inner, spec.hidden_size, spec.mlp_bias)
            for part in ("gate_proj", "up_proj")
        )
        product = graph.node("Mul", [self._ops.silu(f"layers.{i}.silu", gate), up], f"layers.{i}.gated")
        down = [self._name(i, "down_proj")]
        return self._project(
            product, f"layers.{i}.down_proj", down, [spec.hidden_size], spec.intermediate_size, spec.mlp_bias
        )

    def norm_weight(self, name: str, size: int | None = None) -> ir.Value:
        """A norm's scale [size, by default H] float32."""
        shape = (size or self._spec.hidden_size,)
        return self._ops.graph.weight(name, ir.DataType.FLOAT, shape, self._weights.use(f"{name}.weight", shape))

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

    def _qk_norm(self, i: int) -> Norms:
        if not self._spec.attention.qk_norm:
            return None
        dim = self._spec.attention.head_dim
        return self.norm_weight(self._name(i, "q_norm"), dim), self.norm_weight(self._name(i, "k_norm"), dim)

    def _project(self, x: ir.Value, name: str, sources: list[str], rows: list[int], row: int, bias: bool) -> ir.Value:
        return linear(self._ops.graph, x, self.linear(name, sources, rows, row, bias), self._recipe.decoder)

    def _name(self, i: int, part: str) -> str:
        return self._spec.names.layer[part].format(i=i)
