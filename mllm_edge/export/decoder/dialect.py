"""What a dialect is: the operators of one runtime, behind one small set of methods."""

from dataclasses import dataclass
from typing import Literal, Protocol

import onnx_ir as ir

from mllm_edge.export.decoder.spec import Activation, NormSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = ["Dialect", "Norm"]


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


class Dialect(Protocol):
    """Builds into `graph`. Hidden states are [B, S, H]; see each dialect for its contract."""

    graph: GraphBuilder
    inputs_embeds: ir.Value
    logits_indices: ir.Value

    @property
    def name(self) -> str:
        """contrib, opset24 or opset17."""
        ...

    @property
    def kv_mode(self) -> Literal["in_place", "append"]:
        """How the graph keeps its cache; see `KVCache`."""
        ...

    def norm(self, name: str, norm: Norm, hidden: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """hidden + residual, normalized, and the sum itself."""
        ...

    def attention(self, layer: int, qkv: ir.Value, qk_norm: tuple[Norm, Norm] | None) -> ir.Value:
        """Rotary embedding, cache update and attention over packed q, k, v [B, S, (heads + 2·kv_heads)·D].

        `qk_norm` are the norms of q and k within each head. Returns [B, S, heads·D].
        """
        ...

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        """The activation, element by element."""
        ...

    def pick_rows(self, name: str, x: ir.Value) -> ir.Value:
        """x [B, S, H] at `logits_indices` [B, K] → [B, K, H]."""
        ...

    def finish(self, logits: ir.Value) -> ir.Model:
        """Declare the outputs and return the graph."""
        ...
