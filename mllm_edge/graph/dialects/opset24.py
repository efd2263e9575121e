"""The `opset24` dialect: standard operators with fused attention and a cache written in place.

For TensorRT ≥ 10.15 and TensorRT for RTX; stock ONNX Runtime ≥ 1.24 runs it too. (T is the graph's float type.)

inputs   inputs_embeds [B, S, H] T; logits_indices [B, K] i64; write_indices [B] i64 (the past length);
         attention_bias [B, 1 or heads, S, L] T, L = past + S; cos, sin [B, S, R/2] T;
         past_key_values.N.key / .value [B, Hkv, Smax, D] T
outputs  logits [B, K, V] f32; present.N.key / .value [B, Hkv, Smax, D], the same buffers as the past

Attention gets no `is_causal` and no `nonpad_kv_seqlen`: TensorRT's parser drops or misreads both without an error.
All masking is the additive bias. TensorRT refuses Attention's `softcap`: such a decoder's attention is written out. It
also wants Smax to be a number, which an engine gets when it is built (`onnx_file/dimensions.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from mllm_edge.graph import operators
from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.decoder_spec import Activation, AttentionSpec, DecoderSpec
from mllm_edge.graph.dialects import base
from mllm_edge.graph.dialects.base import Norm, SelfAttention

__all__ = ["Opset24"]

_MINIMUM = {"onnxruntime": "1.24", "tensorrt": "10.15", "tensorrt_rtx": "1.2"}
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Opset24:
    """TensorScatter into the cache, a slice of it as long as the bias, Attention over the slice."""

    name: Literal["opset24"] = "opset24"
    kv_mode: Literal["in_place"] = "in_place"

    @staticmethod
    def minimum(spec: DecoderSpec | None) -> Mapping[str, str]:
        return _MINIMUM

    def __init__(self, name: str, data: DataSink, dtype: ir.DataType = _FLOAT):
        self.graph, self._dtype = GraphBuilder(name, 24, data, dtype), dtype
        self._present: list[tuple[ir.Value, ir.Value]] = []

    def decoder_inputs(self, spec: DecoderSpec) -> None:
        self._spec, graph, dtype = spec, self.graph, self._dtype
        self._write = graph.input("write_indices", _INT64, ("batch",))
        self._biases = base.bias_inputs(graph, spec, dtype, "batch")
        self._ropes = base.rope_inputs(graph, spec, dtype)
        self._cache = ("batch", spec.attention.kv_heads, "capacity", spec.attention.head_dim)
        self._past = base.cache_inputs(graph, spec, dtype, self._cache)
        self._length = graph.node("Shape", [self._biases[0]], "length", start=-1)

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
        value = operators.heads_first(graph, f"{name}.value", self._heads(f"{name}.value.heads", value))
        past_key, past_value = self._past[layer.cache]
        keys, key = self._cached(f"{name}.keys", past_key, key)
        values, value = self._cached(f"{name}.values", past_value, value)
        self._present.append((key, value))
        return self._attended(name, attention, query, keys, values, self._biases[layer.window])

    def attention(
        self, name: str, spec: AttentionSpec, query: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        heads = operators.reshape(self.graph, f"{name}.query.heads", query, (0, 0, -1, spec.head_dim))
        rows = operators.heads_first(self.graph, f"{name}.query", heads)
        return self._attended(name, spec, rows, keys, values, bias)

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            # Swish is a TensorRT 11 operator; the product runs everywhere.
            return self.graph.node("Mul", [x, self.graph.node("Sigmoid", [x], f"{name}.sigmoid")], name)
        if kind in ("gelu", "gelu_tanh"):
            return self.graph.node("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")
        simple = operators.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    vision_opset = 24

    @staticmethod
    def vision_norm(graph: GraphBuilder, name: str, x: ir.Value, scale: ir.Value, eps: float) -> ir.Value:
        return graph.node("RMSNormalization", [x, scale], name, epsilon=eps, axis=-1)

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
        """Standard Attention, which needs its scale: TensorRT has no default."""
        parts = zip((query, key, value), "qkv", strict=True)
        inputs = [base.split_heads(graph, f"{name}.{part}", x, heads) for x, part in parts]
        total = graph.node("Attention", [*inputs, *([] if bias is None else [bias])], f"{name}.heads", scale=scale)
        return operators.merge_heads(graph, name, operators.heads_first(graph, f"{name}.rows", total))

    def decoder_outputs(self, logits: ir.Value) -> None:
        base.logits_output(self.graph, self._spec, logits)
        base.cache_outputs(self.graph, self._present, self._dtype, self._cache)

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        op = {"rms": "RMSNormalization", "layer": "LayerNormalization"}[norm.spec.kind]
        return self.graph.node(op, [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)

    def _heads(self, name: str, x: ir.Value) -> ir.Value:
        return operators.reshape(self.graph, name, x, (0, 0, -1, self._spec.attention.head_dim))

    def _rotated(self, name: str, x: ir.Value, norm: Norm | None, rope: int | None) -> ir.Value:
        """[B, S, heads·D] → normalized (if asked), rotated [B, heads, S, D]."""
        heads = self._heads(f"{name}.heads", x)
        if norm is not None:
            heads = base.normed_heads(self, f"{name}.norm", norm, heads)
        heads = operators.heads_first(self.graph, f"{name}.rows", heads)
        if rope is None:
            return heads
        # 0 rotates the whole head.
        dim = self._spec.ropes[rope].dim
        partial = 0 if dim == self._spec.attention.head_dim else dim
        return self.graph.node("RotaryEmbedding", [heads, *self._ropes[rope]], name, rotary_embedding_dim=partial)

    def _cached(self, name: str, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The cache's first `length` positions after writing `new`, and the whole cache."""
        present = self.graph.node("TensorScatter", [past, new, self._write], f"{name}.present", axis=-2, mode="linear")
        start = self.graph.constant("slice.start", np.array([0], np.int64))
        axis = self.graph.constant("slice.axis", np.array([2], np.int64))
        return self.graph.node("Slice", [present, start, self._length, axis], name), present

    def _attended(
        self, name: str, spec: AttentionSpec, query: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        """query [B, heads, S, D] over keys and values [B, Hkv, L, D] → [B, S, heads·D]."""
        graph = self.graph
        if spec.softcap is not None:
            rows = operators.heads_first(graph, f"{name}.query.positions", query)
            shared = operators.shared(graph, f"{name}.bias", bias)
            return operators.grouped_attention(graph, name, spec, rows, keys, values, shared)
        attended = graph.node("Attention", [query, keys, values, bias], f"{name}.heads", scale=spec.scale)
        return operators.merge_heads(graph, name, operators.heads_first(graph, f"{name}.rows", attended))
