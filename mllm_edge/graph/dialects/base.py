"""What a dialect is: the operators of one runtime, behind one small set of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir

from mllm_edge.graph import operators
from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.decoder_spec import Activation, AttentionSpec, DecoderSpec, NormSpec
from mllm_edge.spec import state_input, state_names, state_output

__all__ = [
    "Dialect",
    "Norm",
    "SelfAttention",
    "bias_inputs",
    "cache_inputs",
    "cache_outputs",
    "logits_output",
    "normed_heads",
    "numbered",
    "rope_inputs",
    "split_heads",
]


@dataclass(frozen=True)
class Norm:
    """A normalization with its weights in the graph: scale and (layer norm only) bias, each [size]."""

    spec: NormSpec
    scale: ir.Value
    bias: ir.Value | None = None

    @property
    def weights(self) -> list[ir.Value]:
        """Scale, and bias where there is one."""
        return [self.scale] if self.bias is None else [self.scale, self.bias]


@dataclass(frozen=True)
class SelfAttention:
    """One cached self-attention. `cache` numbers the layers that have one; `rope` (None: none) and `window` are indices
    into the spec's; `qk_norm` are the norms of q and k within each head."""

    name: str
    cache: int
    rope: int | None
    window: int
    qk_norm: tuple[Norm, Norm] | None


class Dialect(Protocol):
    """Builds into `graph`, whose float type is T. Hidden states are [B, S, H] in T; see each dialect for its
    contract."""

    graph: GraphBuilder

    @property
    def name(self) -> str:
        """contrib, opset24 or opset17."""
        ...

    @staticmethod
    def minimum(spec: DecoderSpec | None) -> Mapping[str, str]:
        """Module name of a runtime → its lowest version that executes a graph of this dialect: the decoder's that is
        described so, or (None) any other."""
        ...

    @property
    def kv_mode(self) -> Literal["in_place", "append"]:
        """How the graph keeps its cache; see `Cache`."""
        ...

    def decoder_inputs(self, spec: DecoderSpec) -> None:
        """Declare what tells a decoder where its tokens stand, and the caches.

        Raises ExportError for a spec that this dialect cannot express.
        """
        ...

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """hidden + residual, normalized, and the sum itself."""
        ...

    def add(self, name: str, hidden: ir.Value, residual: ir.Value | None) -> ir.Value:
        """hidden + residual."""
        ...

    def head_norm(self, name: str, norm: Norm, x: ir.Value) -> ir.Value:
        """The norm over the last axis of x [B, S, heads, D]."""
        ...

    def self_attention(self, layer: SelfAttention, query_key: ir.Value, value: ir.Value) -> ir.Value:
        """Rotary embedding, cache update and attention over packed q and k [B, S, (heads + kv_heads)·D] and v
        [B, S, kv_heads·D].

        Returns [B, S, heads·D].
        """
        ...

    def attention(
        self, name: str, spec: AttentionSpec, query: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        """Attention without a cache: query [B, S, heads·D] over keys and values [B, Hkv, N, D] with bias
        [B, 1 or heads, S, N] → [B, S, heads·D]."""
        ...

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        """The activation, element by element."""
        ...

    vision_opset: int

    @staticmethod
    def vision_norm(graph: GraphBuilder, name: str, x: ir.Value, scale: ir.Value, eps: float) -> ir.Value:
        """x / √(mean(x²) + eps) · scale over the last axis, in a graph that was traced."""
        ...

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
        """Attention of query [N, S, D] over key and value [N, L, D] with bias [N or 1, 1 or heads, S, L] → [N, S, D],
        in a graph that was traced."""
        ...

    def decoder_outputs(self, logits: ir.Value) -> None:
        """Declare logits and the new caches."""
        ...


# ---------------------------------------------------------------- what the dialects share
def numbered(name: str, index: int) -> str:
    """Inputs of which there may be several: the first has the plain name."""
    return f"{name}.{index}" if index else name


def bias_inputs(graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType, batch: int | str) -> list[ir.Value]:
    """attention_bias [B, 1 or heads, S, L] for every window."""
    shape = (batch, spec.heads_in_bias, "sequence", "length")
    return [graph.input(numbered("attention_bias", w), dtype, shape) for w in range(len(spec.windows))]


def cache_inputs(
    graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType, shape: Sequence[int | str]
) -> list[tuple[ir.Value, ir.Value]]:
    """Keys and values that were before, for every layer with self-attention."""
    found = []
    for i in range(spec.cached):
        key, value = (graph.input(state_input("growing", name), dtype, shape) for name in state_names("growing", i))
        found.append((key, value))
    return found


def cache_outputs(
    graph: GraphBuilder,
    present: Sequence[tuple[ir.Value, ir.Value]],
    dtype: ir.DataType,
    shape: Sequence[int | str],
) -> None:
    """Keys and values that are behind it, for every layer with self-attention."""
    for i, pair in enumerate(present):
        for value, name in zip(pair, state_names("growing", i), strict=True):
            graph.output(value, state_output("growing", name), dtype, shape)


def logits_output(graph: GraphBuilder, spec: DecoderSpec, logits: ir.Value) -> None:
    """logits [B, K, V] float32."""
    graph.output(logits, "logits", ir.DataType.FLOAT, ("batch", "rows", spec.vocab_size))


def normed_heads(ops: Dialect, name: str, norm: Norm, x: ir.Value) -> ir.Value:
    """The norm within each head of x [B, S, heads, D]; scale and bias are [D], or [heads, D] where they differ."""
    if not norm.spec.per_head:
        return ops.head_norm(name, norm, x)
    graph = ops.graph
    assert norm.scale.shape is not None
    ones = np.ones(norm.scale.shape.numpy()[-1], graph.float_type.numpy())
    plain = Norm(replace(norm.spec, per_head=False, bias=False), graph.constant(f"ones.{ones.size}", ones))
    scaled = graph.node("Mul", [ops.head_norm(f"{name}.plain", plain, x), norm.scale], f"{name}.scaled")
    return scaled if norm.bias is None else graph.node("Add", [scaled, norm.bias], name)


def rope_inputs(graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType) -> list[list[ir.Value]]:
    """cos and sin [B, S, R/2] for every rope: the rows of the new tokens."""
    return [
        [graph.input(numbered(part, k), dtype, ("batch", "sequence", rope.dim // 2)) for part in ("cos", "sin")]
        for k, rope in enumerate(spec.ropes)
    ]


def split_heads(graph: GraphBuilder, name: str, x: ir.Value, heads: int) -> ir.Value:
    """[N, S, D] → [N, heads, S, D/heads]."""
    return operators.heads_first(graph, f"{name}.heads", operators.reshape(graph, name, x, (0, 0, heads, -1)))
