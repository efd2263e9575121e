"""The `opset24` dialect: standard operators with fused attention and a cache written in place.

For TensorRT ≥ 10.15 and TensorRT for RTX; stock ONNX Runtime ≥ 1.24 runs it too. (T is the graph's float type.)

inputs   inputs_embeds [B, S, H] T; logits_indices [B, K] i64; write_indices [B] i64 (the past length);
         attention_bias [1, 1, S, L] T, L = past + S; cos, sin [B, S, R/2] T;
         past_key_values.N.key / .value [B, Hkv, Smax, D] T
outputs  logits [B, K, V] f32; present.N.key / .value [B, Hkv, Smax, D], the same buffers as the past

Attention gets no `is_causal` and no `nonpad_kv_seqlen`: TensorRT's parser drops or misreads both without an error.
All masking is the additive bias. TensorRT also wants Smax to be a number: give `capacity` to fix it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.dialect import Norm
from mllm_edge.export.decoder.dialects import standard
from mllm_edge.export.decoder.spec import Activation, DecoderSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = ["MINIMUM", "Opset24"]

MINIMUM = {"onnxruntime": "1.24", "tensorrt": "10.15", "tensorrt_rtx": "1.2"}
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Opset24:
    """TensorScatter into the cache, a slice of it as long as the bias, Attention over the slice."""

    name: Literal["opset24"] = "opset24"
    kv_mode: Literal["in_place"] = "in_place"

    def __init__(self, spec: DecoderSpec, data: DataSink, dtype: ir.DataType = _FLOAT, capacity: int | None = None):
        self._spec, self._dtype = spec, dtype
        graph = self.graph = GraphBuilder("decoder", 24, data, dtype)
        self.inputs_embeds, self.logits_indices = standard.token_inputs(graph, spec, dtype)
        self._write = graph.input("write_indices", _INT64, ("batch",))
        self._bias = graph.input("attention_bias", dtype, (1, 1, "sequence", "length"))
        self._rope = []
        if spec.rope is not None:
            table = ("batch", "sequence", spec.rope.dim // 2)
            self._rope = [graph.input(name, dtype, table) for name in ("cos", "sin")]
        self._cache = ("batch", spec.attention.kv_heads, capacity or "capacity", spec.attention.head_dim)
        self._past = standard.cache_inputs(graph, spec, dtype, self._cache)
        self._present: list[tuple[ir.Value, ir.Value]] = []
        self._length = graph.node("Shape", [self._bias], "length", start=-1)

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        total = hidden if residual is None else self.graph.node("Add", [hidden, residual], f"{name}.sum")
        return self._norm(name, norm, total), total

    def attention(self, layer: int, qkv: ir.Value, qk_norm: tuple[Norm, Norm] | None) -> ir.Value:
        name, graph = f"layers.{layer}.attention", self.graph
        query, key, value = standard.split_qkv(graph, name, qkv, self._spec.attention)
        norms: Sequence[Norm | None] = qk_norm or (None, None)
        query = self._rotated(f"{name}.query", query, norms[0])
        key = self._rotated(f"{name}.key", key, norms[1])
        value = standard.heads_first(graph, f"{name}.value", self._heads(f"{name}.value.heads", value))
        past_key, past_value = self._past[layer]
        keys, key = self._cached(f"{name}.keys", past_key, key)
        values, value = self._cached(f"{name}.values", past_value, value)
        self._present.append((key, value))
        scale = self._spec.attention.scale
        attended = graph.node("Attention", [query, keys, values, self._bias], f"{name}.heads", scale=scale)
        return standard.merge_heads(graph, name, standard.heads_first(graph, f"{name}.rows", attended))

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            # Swish is a TensorRT 11 operator; the product runs everywhere.
            return self.graph.node("Mul", [x, self.graph.node("Sigmoid", [x], f"{name}.sigmoid")], name)
        if kind in ("gelu", "gelu_tanh"):
            return self.graph.node("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")
        simple = standard.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    def pick_rows(self, name: str, x: ir.Value) -> ir.Value:
        return standard.pick_rows(self.graph, name, x, self.logits_indices)

    def finish(self, logits: ir.Value) -> ir.Model:
        standard.logits_output(self.graph, self._spec, self.graph.cast(logits, _FLOAT, "logits.float"))
        standard.cache_outputs(self.graph, self._present, self._dtype, self._cache)
        return self.graph.model()

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        op = {"rms": "RMSNormalization", "layer": "LayerNormalization"}[norm.spec.kind]
        return self.graph.node(op, [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)

    def _heads(self, name: str, x: ir.Value) -> ir.Value:
        return standard.reshape(self.graph, name, x, (0, 0, -1, self._spec.attention.head_dim))

    def _rotated(self, name: str, x: ir.Value, norm: Norm | None) -> ir.Value:
        """[B, S, heads·D] → normalized (if asked), rotated [B, heads, S, D]."""
        heads = self._heads(f"{name}.heads", x)
        if norm is not None:
            heads = self._norm(f"{name}.norm", norm, heads)
        heads = standard.heads_first(self.graph, f"{name}.rows", heads)
        if self._spec.rope is None:
            return heads
        # 0 rotates the whole head.
        dim = self._spec.rope.dim
        partial = 0 if dim == self._spec.attention.head_dim else dim
        return self.graph.node("RotaryEmbedding", [heads, *self._rope], name, rotary_embedding_dim=partial)

    def _cached(self, name: str, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The cache's first `length` positions after writing `new`, and the whole cache."""
        present = self.graph.node("TensorScatter", [past, new, self._write], f"{name}.present", axis=-2, mode="linear")
        start = self.graph.constant("slice.start", np.array([0], np.int64))
        axis = self.graph.constant("slice.axis", np.array([2], np.int64))
        return self.graph.node("Slice", [present, start, self._length, axis], name), present
