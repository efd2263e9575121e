"""What a dialect is: the operators of one runtime, behind one small set of methods."""

from dataclasses import dataclass
from typing import Literal, Protocol

import onnx_ir as ir

from mllm_edge.export.decoder.spec import Activation, AttentionSpec, DecoderSpec, NormSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = ["Dialect", "Norm", "SelfAttention"]


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
    """Builds into `graph`, whose float type is T. Hidden states are [B, S, H] in T, the residual stream in
    `residual_type`; see each dialect for its contract."""

    graph: GraphBuilder
    residual_type: ir.DataType

    @property
    def name(self) -> str:
        """contrib, opset24 or opset17."""
        ...

    @property
    def kv_mode(self) -> Literal["in_place", "append"]:
        """How the graph keeps its cache; see `KVCache`."""
        ...

    def decoder_inputs(self, spec: DecoderSpec, capacity: int | None) -> None:
        """Declare what tells a decoder where its tokens stand, and the caches (of `capacity` places, if given).

        Raises ExportError for a spec that this dialect cannot express.
        """
        ...

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """hidden + residual, normalized, and the sum itself."""
        ...

    def add(self, name: str, hidden: ir.Value, residual: ir.Value | None) -> ir.Value:
        """hidden + residual, in the residual stream's type."""
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

    def decoder_outputs(self, logits: ir.Value) -> None:
        """Declare logits and the new caches."""
        ...
