"""The `opset17` dialect: standard primitives and an append-only cache.

For TensorRT 10.3 (JetPack 6) and everything newer; any ONNX Runtime runs it. Named after the opset whose operators it
is made of; the graphs import 19, or 21 where weights have blocks. (T is the graph's float type.)

inputs   inputs_embeds [1, S, H] T; logits_indices [1, K] i64; attention_bias [1, 1 or heads, S, L] T, L = past + S;
         cos, sin [1, S, R/2] T; past_key_values.N.key / .value [1, P, Hkv, D] T, a prefix view of a larger buffer
outputs  logits [1, K, V] f32; present.N.key / .value [1, S, Hkv, D]: the new rows only, to be written behind the prefix

Scores are concatenated, caches never are: no step copies the cache.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from mllm_edge.errors import ExportError
from mllm_edge.graph import operators
from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.decoder_spec import Activation, AttentionSpec, DecoderSpec
from mllm_edge.graph.dialects import base
from mllm_edge.graph.dialects.base import Norm, SelfAttention

__all__ = ["Opset17"]

_MINIMUM = {"onnxruntime": "1.18", "tensorrt": "10.3", "tensorrt_rtx": "1.0"}
_OPSET = 19  # the first whose DequantizeLinear takes float16 scales
_FLOAT = ir.DataType.FLOAT


class Opset17:
    """Norms, rotary embedding and attention written out."""

    name: Literal["opset17"] = "opset17"
    kv_mode: Literal["append"] = "append"

    @staticmethod
    def minimum(spec: DecoderSpec | None) -> Mapping[str, str]:
        return _MINIMUM

    def __init__(self, name: str, data: DataSink, dtype: ir.DataType = _FLOAT):
        self.graph, self._dtype = GraphBuilder(name, _OPSET, data, dtype), dtype
        self._present: list[tuple[ir.Value, ir.Value]] = []

    def decoder_inputs(self, spec: DecoderSpec) -> None:
        attention, graph = spec.attention, self.graph
        if spec.heads_in_bias > 1 and attention.heads != attention.kv_heads:
            raise ExportError(
                "dialect opset17: a bias per head where heads share keys",
                "export for a target with another dialect",
            )
        self._spec = spec
        biases = base.bias_inputs(graph, spec, self._dtype, 1)
        self._biases = [operators.shared(graph, f"{bias.name}.shared", bias) for bias in biases]
        # [B, S, R/2] → [B, S, 1, R/2]: the same rotation for every head.
        self._ropes = [
            [operators.unsqueeze(graph, f"{rows.name}.heads", rows, 2) for rows in rope]
            for rope in base.rope_inputs(graph, spec, self._dtype)
        ]
        self._past = base.cache_inputs(graph, spec, self._dtype, (1, "past", attention.kv_heads, attention.head_dim))

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        total = self.add(name, hidden, residual)
        return self._norm(name, norm, total), total

    def add(self, name: str, hidden: ir.Value, residual: ir.Value | None) -> ir.Value:
        return hidden if residual is None else self.graph.node("Add", [hidden, residual], f"{name}.sum")

    def head_norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        return self._norm(name, norm, x)

    def self_attention(self, layer: SelfAttention, query_key: ir.Value, value: ir.Value) -> ir.Value:
        name, graph, attention = layer.name, self.graph, self._spec.attention
        query, key = operators.split_query_key(graph, name, query_key, attention)
        norms: Sequence[Norm | None] = layer.qk_norm or (None, None)
        query = self._rotated(f"{name}.query", query, norms[0], layer.rope)
        key = self._rotated(f"{name}.key", key, norms[1], layer.rope)
        value = self._heads(f"{name}.value", value)
        self._present.append((key, value))
        past_key, past_value = self._past[layer.cache]
        groups = operators.grouped(graph, f"{name}.query", query, attention)
        scores = [self._scores(f"{name}.{part}", groups, rows) for part, rows in (("past", past_key), ("new", key))]
        joined = graph.node("Concat", scores, f"{name}.scores", axis=-1)
        weights = operators.weights_of(graph, name, attention, joined, self._biases[layer.window])
        return self._weighted(name, weights, past_value, value)

    def attention(
        self, name: str, spec: AttentionSpec, query: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        return operators.grouped_attention(
            self.graph, name, spec, query, keys, values, operators.shared(self.graph, f"{name}.bias", bias)
        )

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            # Swish is a TensorRT 11 operator; the product runs everywhere.
            return self.graph.node("Mul", [x, self.graph.node("Sigmoid", [x], f"{name}.sigmoid")], name)
        if kind in ("gelu", "gelu_tanh"):
            return operators.gelu(self.graph, name, x, tanh=kind == "gelu_tanh")
        simple = operators.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    vision_opset = 20  # the first with Gelu; TensorRT ≥ 10.3

    @staticmethod
    def vision_norm(graph: GraphBuilder, name: str, x: ir.Value, scale: ir.Value, eps: float) -> ir.Value:
        half = graph.float_type != _FLOAT
        wide = graph.node("Cast", [x], f"{name}.wide", to=_FLOAT) if half else x
        normed = operators.rms_normed(graph, name, wide, eps)
        narrow = graph.node("Cast", [normed], f"{name}.narrow", to=graph.float_type) if half else normed
        return graph.node("Mul", [narrow, scale], name)

    @staticmethod
    def vision_attention(
        graph: GraphBuilder,
        name: str,
        heads: int,
        scale: float,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value | None,
    ) -> ir.Value:
        """Matrix products and a softmax. The query is scaled, not the scores: there are more of them, and half
        precision keeps the smaller products."""
        parts = zip((query, key, value), "qkv", strict=True)
        query, key, value = (base.split_heads(graph, f"{name}.{part}", x, heads) for x, part in parts)
        columns = graph.node("Transpose", [key], f"{name}.columns", perm=[0, 1, 3, 2])
        query = operators.times(graph, f"{name}.scaled", query, scale)
        scores = graph.node("MatMul", [query, columns], f"{name}.scores")
        if bias is not None:
            scores = graph.node("Add", [scores, bias], f"{name}.biased")
        weights = graph.node("Softmax", [scores], f"{name}.weights", axis=-1)
        total = graph.node("MatMul", [weights, value], f"{name}.total")
        return operators.merge_heads(graph, name, operators.heads_first(graph, f"{name}.rows", total))

    def decoder_outputs(self, logits: ir.Value) -> None:
        base.logits_output(self.graph, self._spec, logits)
        attention = self._spec.attention
        shape = (1, "sequence", attention.kv_heads, attention.head_dim)
        base.cache_outputs(self.graph, self._present, self._dtype, shape)

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        if norm.spec.kind == "rms":
            return self._rms(name, norm, x)
        return self.graph.node("LayerNormalization", [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)

    def _rms(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        """x / √(mean(x²) + eps) · scale; the mean in float32, where half precision would overflow."""
        graph = self.graph
        half = self._dtype != _FLOAT
        wide = graph.node("Cast", [x], f"{name}.wide", to=_FLOAT) if half else x
        normed = operators.rms_normed(graph, name, wide, norm.spec.eps)
        narrow = graph.node("Cast", [normed], f"{name}.narrow", to=self._dtype) if half else normed
        return graph.node("Mul", [narrow, norm.scale], name)

    def _heads(self, name: str, x: ir.Value) -> ir.Value:
        return operators.reshape(self.graph, name, x, (0, 0, -1, self._spec.attention.head_dim))

    def _rotated(self, name: str, x: ir.Value, norm: Norm | None, rope: int | None) -> ir.Value:
        """[B, S, heads·D] → normalized (if asked), rotated [B, S, heads, D]; halves convention."""
        graph = self.graph
        heads = self._heads(f"{name}.heads", x)
        if norm is not None:
            heads = base.normed_heads(self, f"{name}.norm", norm, heads)
        if rope is None:
            return heads
        half, (cos, sin) = self._spec.ropes[rope].dim // 2, self._ropes[rope]
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

    def _scores(self, name: str, groups: ir.Value, keys: ir.Value) -> ir.Value:
        """q·k: groups [1, Hkv, G, S, D] × keys [1, P, Hkv, D] → [1, Hkv, G, S, P]."""
        columns = self.graph.node("Transpose", [keys], f"{name}.transposed", perm=[0, 2, 3, 1])
        shared = operators.shared(self.graph, f"{name}.columns", columns)
        return self.graph.node("MatMul", [groups, shared], f"{name}.scores")

    def _weighted(self, name: str, weights: ir.Value, past: ir.Value, new: ir.Value) -> ir.Value:
        """weights [1, Hkv, G, S, L] over values [1, P, Hkv, D] and [1, S, Hkv, D] → [1, S, heads·D]."""
        graph, sides = self.graph, (("past", past), ("new", new))
        lengths = [graph.node("Shape", [rows], f"{name}.{part}.length", start=1, end=2) for part, rows in sides]
        sizes = graph.node("Concat", lengths, f"{name}.lengths", axis=0)
        parts = graph.nodes("Split", [weights, sizes], f"{name}.parts", outputs=2, axis=-1)
        sums = []
        for (part, rows), share in zip(sides, parts, strict=True):
            values = operators.heads_first(graph, f"{name}.{part}.values", rows)
            shared = operators.shared(graph, f"{name}.{part}.shared", values)
            sums.append(graph.node("MatMul", [share, shared], f"{name}.{part}.sum"))
        total = graph.node("Add", sums, f"{name}.total")
        rows_first = graph.node("Transpose", [total], f"{name}.rows", perm=[0, 3, 1, 2, 4])
        return operators.merge_heads(graph, name, rows_first)
