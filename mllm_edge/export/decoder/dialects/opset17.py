"""The `opset17` dialect: standard primitives and an append-only cache.

For TensorRT 10.3 (JetPack 6) and everything newer; any ONNX Runtime runs it. (T is the graph's float type.)

inputs   inputs_embeds [1, S, H] T; logits_indices [1, K] i64; attention_bias [1, 1, S, L] T, L = past + S;
         cos, sin [1, S, R/2] T; past_key_values.N.key / .value [1, P, Hkv, D] T, a prefix view of a larger buffer
outputs  logits [1, K, V] f32; present.N.key / .value [1, S, Hkv, D]: the new rows only, to be written behind the prefix

Scores are concatenated, caches never are: no step copies the cache.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.dialect import Norm
from mllm_edge.export.decoder.dialects import standard
from mllm_edge.export.decoder.spec import Activation, DecoderSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = ["MINIMUM", "Opset17"]

MINIMUM = {"onnxruntime": "1.18", "tensorrt": "10.3", "tensorrt_rtx": "1.0"}
_FLOAT = ir.DataType.FLOAT
Curve = Callable[[ir.Value], ir.Value]


class Opset17:
    """Norms, rotary embedding and attention written out."""

    name: Literal["opset17"] = "opset17"
    kv_mode: Literal["append"] = "append"

    def __init__(self, spec: DecoderSpec, data: DataSink, dtype: ir.DataType = _FLOAT, capacity: int | None = None):
        self._spec, self._dtype = spec, dtype
        graph = self.graph = GraphBuilder("decoder", 17, data, dtype)
        self.inputs_embeds, self.logits_indices = standard.token_inputs(graph, spec, dtype)
        self._bias = graph.input("attention_bias", dtype, (1, 1, "sequence", "length"))
        self._rope = [] if spec.rope is None else self._rope_inputs(spec.rope.dim)
        cache = (1, "past", spec.attention.kv_heads, spec.attention.head_dim)
        self._past = standard.cache_inputs(graph, spec, dtype, cache)
        self._present: list[tuple[ir.Value, ir.Value]] = []

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        total = hidden if residual is None else self.graph.node("Add", [hidden, residual], f"{name}.sum")
        return self._norm(name, norm, total), total

    def attention(self, layer: int, qkv: ir.Value, qk_norm: tuple[Norm, Norm] | None) -> ir.Value:
        name, graph = f"layers.{layer}.attention", self.graph
        query, key, value = standard.split_qkv(graph, name, qkv, self._spec.attention)
        norms: Sequence[Norm | None] = qk_norm or (None, None)
        query = self._rotated(f"{name}.query", query, norms[0])
        key = self._rotated(f"{name}.key", key, norms[1])
        value = self._heads(f"{name}.value", value)
        self._present.append((key, value))
        past_key, past_value = self._past[layer]
        groups = self._grouped(f"{name}.query", query)
        scores = [self._scores(f"{name}.{part}", groups, rows) for part, rows in (("past", past_key), ("new", key))]
        weights = self._softmax(name, graph.node("Concat", scores, f"{name}.scores", axis=-1))
        return self._weighted(name, weights, past_value, value)

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            # Swish is a TensorRT 11 operator; the product runs everywhere.
            return self.graph.node("Mul", [x, self.graph.node("Sigmoid", [x], f"{name}.sigmoid")], name)
        if kind == "gelu":
            return self._gelu(name, x, lambda scaled: self.graph.node("Erf", [scaled], f"{name}.erf"), x, 0.5**0.5)
        if kind == "gelu_tanh":
            return self._gelu_tanh(name, x)
        simple = standard.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    def pick_rows(self, name: str, x: ir.Value) -> ir.Value:
        return standard.pick_rows(self.graph, name, x, self.logits_indices)

    def finish(self, logits: ir.Value) -> ir.Model:
        standard.logits_output(self.graph, self._spec, self.graph.cast(logits, _FLOAT, "logits.float"))
        attention = self._spec.attention
        shape = (1, "sequence", attention.kv_heads, attention.head_dim)
        standard.cache_outputs(self.graph, self._present, self._dtype, shape)
        return self.graph.model()

    def _rope_inputs(self, dim: int) -> list[ir.Value]:
        """cos and sin [B, S, R/2] → [B, S, 1, R/2]: the same rotation for every head."""
        axis = self.graph.constant("axis.2", np.array([2], np.int64))
        rows = [self.graph.input(name, self._dtype, ("batch", "sequence", dim // 2)) for name in ("cos", "sin")]
        return [self.graph.node("Unsqueeze", [row, axis], f"{row.name}.heads") for row in rows]

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        if norm.spec.kind == "layer":
            return self.graph.node("LayerNormalization", [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)
        return self._rms(name, norm, x)

    def _rms(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        """x / √(mean(x²) + eps) · scale; the mean in float32, where half precision would overflow."""
        graph = self.graph
        wide = graph.cast(x, _FLOAT, f"{name}.wide")
        mean = graph.node("ReduceMean", [graph.node("Mul", [wide, wide], f"{name}.square")], f"{name}.mean", axes=[-1])
        eps = graph.constant(f"norm.eps.{norm.spec.eps:g}", np.array(norm.spec.eps, np.float32))
        root = graph.node("Sqrt", [graph.node("Add", [mean, eps], f"{name}.variance")], f"{name}.root")
        normed = graph.node("Div", [wide, root], f"{name}.normed")
        if self._dtype != _FLOAT:
            normed = graph.node("Cast", [normed], f"{name}.narrow", to=self._dtype)
        return graph.node("Mul", [normed, norm.scale], name)

    def _gelu(self, name: str, x: ir.Value, curve: Curve, inner: ir.Value, scale: float) -> ir.Value:
        """x/2 · (1 + curve(scale · inner)): both forms of GELU."""
        scaled = self._times(f"{name}.scaled", inner, scale)
        one = self.graph.constant("one", np.array(1, self._dtype.numpy()))
        plus = self.graph.node("Add", [curve(scaled), one], f"{name}.plus")
        return self.graph.node("Mul", [self._times(f"{name}.half", x, 0.5), plus], name)

    def _gelu_tanh(self, name: str, x: ir.Value) -> ir.Value:
        """tanh of √(2/π)·(x + 0.044715 x³) (Hendrycks and Gimpel, arXiv 1606.08415)."""
        graph = self.graph
        cube = graph.node("Mul", [graph.node("Mul", [x, x], f"{name}.square"), x], f"{name}.cube")
        inner = graph.node("Add", [x, self._times(f"{name}.cubic", cube, 0.044715)], f"{name}.inner")
        tanh: Curve = lambda scaled: graph.node("Tanh", [scaled], f"{name}.tanh")  # noqa: E731
        return self._gelu(name, x, tanh, inner, (2 / np.pi) ** 0.5)

    def _times(self, name: str, x: ir.Value, factor: float) -> ir.Value:
        value = self.graph.constant(f"factor.{factor:.6g}", np.array(factor, self._dtype.numpy()))
        return self.graph.node("Mul", [x, value], name)

    def _heads(self, name: str, x: ir.Value) -> ir.Value:
        return standard.reshape(self.graph, name, x, (0, 0, -1, self._spec.attention.head_dim))

    def _rotated(self, name: str, x: ir.Value, norm: Norm | None) -> ir.Value:
        """[B, S, heads·D] → normalized (if asked), rotated [B, S, heads, D]; halves convention."""
        graph = self.graph
        heads = self._heads(f"{name}.heads", x)
        if norm is not None:
            heads = self._norm(f"{name}.norm", norm, heads)
        if self._spec.rope is None:
            return heads
        half, (cos, sin) = self._spec.rope.dim // 2, self._rope
        rest = self._spec.attention.head_dim - 2 * half
        sizes = graph.constant("rope.sizes", np.array([half, half, rest][: 3 if rest else 2], np.int64))
        first, second, *kept = graph.nodes("Split", [heads, sizes], f"{name}.halves", outputs=3 if rest else 2, axis=-1)
        rotated = [
            graph.node("Sub", self._products(f"{name}.a", (first, cos), (second, sin)), f"{name}.first"),
            graph.node("Add", self._products(f"{name}.b", (second, cos), (first, sin)), f"{name}.second"),
        ]
        return graph.node("Concat", [*rotated, *kept], f"{name}.rotated", axis=-1)

    def _products(self, name: str, *pairs: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
        return [self.graph.node("Mul", pair, f"{name}{i}") for i, pair in enumerate(pairs)]

    def _grouped(self, name: str, query: ir.Value) -> ir.Value:
        """[1, S, heads, D] → [1, Hkv, G, S, D]: the G heads that share keys stand together, so no key is repeated."""
        attention = self._spec.attention
        groups = attention.heads // attention.kv_heads
        split = standard.reshape(
            self.graph, f"{name}.split", query, (0, 0, attention.kv_heads, groups, attention.head_dim)
        )
        return self.graph.node("Transpose", [split], f"{name}.groups", perm=[0, 2, 3, 1, 4])

    def _scores(self, name: str, groups: ir.Value, keys: ir.Value) -> ir.Value:
        """q·k: groups [1, Hkv, G, S, D] × keys [1, P, Hkv, D] → [1, Hkv, G, S, P]."""
        columns = self.graph.node("Transpose", [keys], f"{name}.transposed", perm=[0, 2, 3, 1])
        return self.graph.node("MatMul", [groups, self._shared(f"{name}.columns", columns)], f"{name}.scores")

    def _softmax(self, name: str, scores: ir.Value) -> ir.Value:
        """Scale, add the bias, softmax over the last axis of [1, Hkv, G, S, L]."""
        scale = self.graph.constant("score.scale", np.array(self._spec.attention.scale, self._dtype.numpy()))
        scaled = self.graph.node("Mul", [scores, scale], f"{name}.scaled")
        biased = self.graph.node("Add", [scaled, self._bias], f"{name}.biased")
        return self.graph.node("Softmax", [biased], f"{name}.weights", axis=-1)

    def _weighted(self, name: str, weights: ir.Value, past: ir.Value, new: ir.Value) -> ir.Value:
        """weights [1, Hkv, G, S, L] over values [1, P, Hkv, D] and [1, S, Hkv, D] → [1, S, heads·D]."""
        graph, sides = self.graph, (("past", past), ("new", new))
        lengths = [graph.node("Shape", [rows], f"{name}.{part}.length", start=1, end=2) for part, rows in sides]
        sizes = graph.node("Concat", lengths, f"{name}.lengths", axis=0)
        parts = graph.nodes("Split", [weights, sizes], f"{name}.parts", outputs=2, axis=-1)
        sums = []
        for (part, rows), share in zip(sides, parts, strict=True):
            values = self._shared(f"{name}.{part}.shared", standard.heads_first(graph, f"{name}.{part}.values", rows))
            sums.append(graph.node("MatMul", [share, values], f"{name}.{part}.sum"))
        total = graph.node("Add", sums, f"{name}.total")
        rows_first = graph.node("Transpose", [total], f"{name}.rows", perm=[0, 3, 1, 2, 4])
        return standard.merge_heads(graph, name, rows_first)

    def _shared(self, name: str, x: ir.Value) -> ir.Value:
        """[1, Hkv, …] → [1, Hkv, 1, …]: one matrix for all heads of a group."""
        axis = self.graph.constant("axis.2", np.array([2], np.int64))
        return self.graph.node("Unsqueeze", [x, axis], name)
