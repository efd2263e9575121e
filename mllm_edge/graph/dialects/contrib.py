"""The `contrib` dialect: ONNX Runtime's own fused operators, the fastest form on its CPU and CUDA providers.

inputs   inputs_embeds [B, S, H] T; logits_indices [B, K] i64; seqlens_k [B] i32 (past + S − 1);
         total_sequence_length [] i32 (past + S); cos, sin [P, R/2] T (a row per position, P ≥ past + S);
         past_key_values.N.key / .value [B, Hkv, C, D] T;
         attention_bias [B, 1 or heads, S, L] T only where the mask is not plainly causal or windowed
outputs  logits [B, K, V] f32; present.N.key / .value [B, Hkv, C, D] T, the same buffers as the past

T is f32 for the CPU and f16 for CUDA, whose kernels take no bias in GroupQueryAttention and in MatMulNBits.
"""

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from mllm_edge.errors import ExportError
from mllm_edge.graph import operators
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder
from mllm_edge.graph.datafile import DataSink
from mllm_edge.graph.decoder_spec import Activation, AttentionSpec, DecoderSpec
from mllm_edge.graph.dialects import base
from mllm_edge.graph.dialects.base import Norm, SelfAttention

__all__ = ["Contrib"]

_MINIMUM = {"onnxruntime": "1.23"}
# GroupQueryAttention's attribute `causal`, which masks with spans need.
_MINIMUM_SPANS = {"onnxruntime": "1.31"}
_FLOAT, _HALF, _INT32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32


class Contrib:
    """Attention with rope and cache is one GroupQueryAttention; sums and norms are one operator."""

    name: Literal["contrib"] = "contrib"
    kv_mode: Literal["in_place"] = "in_place"

    @staticmethod
    def minimum(spec: DecoderSpec | None) -> Mapping[str, str]:
        return _MINIMUM_SPANS if spec is not None and spec.spans else _MINIMUM

    def __init__(self, name: str, data: DataSink, float_type: ir.DataType = _FLOAT):
        if float_type not in (_FLOAT, _HALF):
            raise ExportError(
                f"dialect contrib: hidden states in {float_type.name}",
                "they are float32 here, or float16 for CUDA; or use dialect opset24 or opset17",
            )
        self.graph = GraphBuilder(name, 17, data, float_type, contrib=True)
        self._present: list[tuple[ir.Value, ir.Value]] = []

    def decoder_inputs(self, spec: DecoderSpec) -> None:
        _check(spec)
        self._spec, graph, kind = spec, self.graph, self.graph.float_type
        self._seqlens = graph.input("seqlens_k", _INT32, ("batch",))
        self._total = graph.input("total_sequence_length", _INT32, ())
        self._ropes = [
            [graph.input(base.numbered(part, k), kind, ("positions", rope.dim // 2)) for part in ("cos", "sin")]
            for k, rope in enumerate(spec.ropes)
        ]
        from_host = spec.spans or spec.heads_in_bias > 1
        self._biases = base.bias_inputs(graph, spec, kind, "batch") if from_host else []
        self._cache = ("batch", spec.attention.kv_heads, "capacity", spec.attention.head_dim)
        self._past = base.cache_inputs(graph, spec, kind, self._cache)

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        if residual is None:
            return self._norm(name, norm, hidden), hidden
        op = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}[norm.spec.kind]
        inputs = [hidden, residual, *norm.weights]
        results = self.graph.nodes(op, inputs, name, MICROSOFT, outputs=4, epsilon=norm.spec.eps)
        # Outputs 1 and 2 (mean and inverse deviation, for training) stay unnamed: they are never computed.
        results[1].name = results[2].name = ""
        return results[0], results[3]

    def add(self, name: str, hidden: ir.Value, residual: ir.Value | None) -> ir.Value:
        return hidden if residual is None else self.graph.node("Add", [hidden, residual], name)

    def head_norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        return self._norm(name, norm, x)

    def self_attention(self, layer: SelfAttention, query_key: ir.Value, value: ir.Value) -> ir.Value:
        attention = self._spec.attention
        projections: list[ir.Value | None]
        if layer.qk_norm is None:
            projections = [self.graph.node("Concat", [query_key, value], f"{layer.name}.packed", axis=-1), None, None]
        else:
            query, key = operators.split_query_key(self.graph, layer.name, query_key, attention)
            query = self._normed_heads(f"{layer.name}.q_norm", query, layer.qk_norm[0])
            key = self._normed_heads(f"{layer.name}.k_norm", key, layer.qk_norm[1])
            projections = [query, key, value]
        rope: list[ir.Value | None] = [None, None] if layer.rope is None else [*self._ropes[layer.rope]]
        inputs = [*projections, *self._past[layer.cache], self._seqlens, self._total, *rope]
        window = self._spec.windows[layer.window]
        options: dict[str, float] = {} if attention.softcap is None else {"softcap": attention.softcap}
        if self._biases:
            inputs += [None, self._biases[layer.window]]
            window = None  # it is in the bias
        if self._spec.spans:
            options["causal"] = 0
        results = self.graph.nodes(
            "GroupQueryAttention",
            inputs,
            layer.name,
            MICROSOFT,
            outputs=3,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            do_rotary=int(layer.rope is not None),
            rotary_interleaved=0,
            scale=attention.scale,
            # The operator's window counts the positions to the left, without the token itself being extra.
            local_window_size=-1 if window is None else window,
            **options,
        )
        self._present.append((results[1], results[2]))
        return results[0]

    def attention(
        self, name: str, spec: AttentionSpec, query: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        return operators.grouped_attention(
            self.graph, name, spec, query, keys, values, operators.shared(self.graph, f"{name}.bias", bias)
        )

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            return self.graph.node("QuickGelu", [x], name, MICROSOFT, alpha=1.0)
        if kind in ("gelu", "gelu_tanh"):
            return self.graph.node("Gelu" if kind == "gelu" else "FastGelu", [x], name, MICROSOFT)
        simple = operators.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    vision_opset = 20  # the first with Gelu; ONNX Runtime ≥ 1.18

    @staticmethod
    def vision_norm(graph: GraphBuilder, name: str, x: ir.Value, scale: ir.Value, eps: float) -> ir.Value:
        return graph.node("SimplifiedLayerNormalization", [x, scale], name, epsilon=eps, axis=-1)

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
        inputs = [query, key, value] if bias is None else [query, key, value, None, None, bias]
        return graph.node("MultiHeadAttention", inputs, f"{name}.heads", MICROSOFT, num_heads=heads, scale=scale)

    def decoder_outputs(self, logits: ir.Value) -> None:
        base.logits_output(self.graph, self._spec, logits)
        base.cache_outputs(self.graph, self._present, self.graph.float_type, self._cache)

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        op = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}[norm.spec.kind]
        return self.graph.node(op, [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)

    def _normed_heads(self, name: str, x: ir.Value, norm: Norm) -> ir.Value:
        """The norm within each head of x [B, S, heads·D]."""
        heads = operators.reshape(self.graph, f"{name}.heads", x, (0, 0, -1, self._spec.attention.head_dim))
        normed = base.normed_heads(self, name, norm, heads)
        return operators.merge_heads(self.graph, f"{name}.merged", normed)


def _check(spec: DecoderSpec) -> None:
    """Raise ExportError for what GroupQueryAttention refuses, or would fail on when it runs."""
    for rope in spec.ropes:
        if rope.dim % 16:
            raise ExportError(
                f"dialect contrib: rotary embedding of {rope.dim} elements of a head",
                "GroupQueryAttention turns multiples of 16; export for a target with another dialect",
            )
    if spec.attention.head_dim % 8:
        raise ExportError(
            f"dialect contrib: heads of {spec.attention.head_dim} elements",
            "GroupQueryAttention needs multiples of 8; export for a target with another dialect",
        )
