"""The `contrib` dialect: ONNX Runtime's own fused operators, the fastest form on its CPU and CUDA providers.

inputs   inputs_embeds [B, S, H] f32; logits_indices [B, K] i64; seqlens_k [B] i32 (past + S − 1);
         total_sequence_length [] i32 (past + S); cos, sin [P, R/2] f32 (a row per position, P ≥ past + S);
         past_key_values.N.key / .value [B, Hkv, C, D] f32
outputs  logits [B, K, V] f32; present.N.key / .value [B, Hkv, C, D], the same buffers as the past
"""

from typing import Literal

import onnx_ir as ir

from mllm_edge.errors import ExportError
from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.dialect import Norm
from mllm_edge.export.decoder.dialects import standard
from mllm_edge.export.decoder.spec import Activation, DecoderSpec
from mllm_edge.export.graph import MICROSOFT, GraphBuilder

__all__ = ["MINIMUM", "Contrib"]

MINIMUM = {"onnxruntime": "1.23"}
_FLOAT, _INT32 = ir.DataType.FLOAT, ir.DataType.INT32


class Contrib:
    """Attention with rope and cache is one GroupQueryAttention; sums and norms are one operator."""

    name: Literal["contrib"] = "contrib"
    kv_mode: Literal["in_place"] = "in_place"

    def __init__(
        self, spec: DecoderSpec, data: DataSink, float_type: ir.DataType = _FLOAT, capacity: int | None = None
    ):
        if float_type != _FLOAT:
            raise ExportError(
                f"dialect contrib: hidden states in {float_type.name} have no kernels on the CPU",
                "use float32 here (weights may be half), or dialect opset24 or opset17 on a GPU",
            )
        if spec.rope is not None and spec.rope.dim % 16:
            raise ExportError(
                f"dialect contrib: rotary embedding of {spec.rope.dim} elements of a head",
                "GroupQueryAttention turns multiples of 16; export for a target with another dialect",
            )
        self._spec = spec
        graph = self.graph = GraphBuilder("decoder", 17, data, contrib=True)
        self.inputs_embeds, self.logits_indices = standard.token_inputs(graph, spec, _FLOAT)
        self._seqlens = graph.input("seqlens_k", _INT32, ("batch",))
        self._total = graph.input("total_sequence_length", _INT32, ())
        self._rope = []
        if spec.rope is not None:
            self._rope = [graph.input(name, _FLOAT, ("positions", spec.rope.dim // 2)) for name in ("cos", "sin")]
        self._cache = ("batch", spec.attention.kv_heads, capacity or "capacity", spec.attention.head_dim)
        self._past = standard.cache_inputs(graph, spec, _FLOAT, self._cache)
        self._present: list[tuple[ir.Value, ir.Value]] = []

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        if residual is None:
            return self._norm(name, norm, hidden), hidden
        op = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}[norm.spec.kind]
        inputs = [hidden, residual, *norm.weights]
        results = self.graph.nodes(op, inputs, name, MICROSOFT, outputs=4, epsilon=norm.spec.eps)
        # Outputs 1 and 2 (mean and inverse deviation, for training) stay unnamed: they are never computed.
        results[1].name = results[2].name = ""
        return results[0], results[3]

    def attention(self, layer: int, qkv: ir.Value, qk_norm: tuple[Norm, Norm] | None) -> ir.Value:
        attention, name = self._spec.attention, f"layers.{layer}.attention"
        projections: list[ir.Value | None] = [qkv, None, None]
        if qk_norm is not None:
            query, key, value = standard.split_qkv(self.graph, name, qkv, attention)
            query = self._head_norm(f"{name}.q_norm", query, qk_norm[0])
            key = self._head_norm(f"{name}.k_norm", key, qk_norm[1])
            projections = [query, key, value]
        results = self.graph.nodes(
            "GroupQueryAttention",
            [*projections, *self._past[layer], self._seqlens, self._total, *self._rope],
            name,
            MICROSOFT,
            outputs=3,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            do_rotary=int(bool(self._rope)),
            rotary_interleaved=0,
            scale=attention.scale,
            # The operator's window counts the positions to the left, without the token itself being extra.
            local_window_size=-1 if attention.window is None else attention.window,
        )
        self._present.append((results[1], results[2]))
        return results[0]

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        if kind == "silu":
            return self.graph.node("QuickGelu", [x], name, MICROSOFT, alpha=1.0)
        if kind in ("gelu", "gelu_tanh"):
            return self.graph.node("Gelu" if kind == "gelu" else "FastGelu", [x], name, MICROSOFT)
        simple = standard.simple_activation(self.graph, name, kind, x)
        assert simple is not None, kind
        return simple

    def pick_rows(self, name: str, x: ir.Value) -> ir.Value:
        return standard.pick_rows(self.graph, name, x, self.logits_indices)

    def finish(self, logits: ir.Value) -> ir.Model:
        standard.logits_output(self.graph, self._spec, logits)
        standard.cache_outputs(self.graph, self._present, _FLOAT, self._cache)
        return self.graph.model()

    def _norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        op = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}[norm.spec.kind]
        return self.graph.node(op, [x, *norm.weights], name, epsilon=norm.spec.eps, axis=-1)

    def _head_norm(self, name: str, x: ir.Value, norm: Norm) -> ir.Value:
        """The norm within each head of x [B, S, heads·D]."""
        heads = standard.reshape(self.graph, f"{name}.heads", x, (0, 0, -1, self._spec.attention.head_dim))
        return standard.merge_heads(self.graph, f"{name}.merged", self._norm(name, norm, heads))
