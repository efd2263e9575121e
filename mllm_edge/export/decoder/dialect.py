"""What a dialect is: the operators of one runtime, behind one small set of methods."""

from typing import Literal, Protocol

import onnx_ir as ir

from mllm_edge.export.graph import GraphBuilder

__all__ = ["Dialect", "Norms"]

Norms = tuple[ir.Value, ir.Value] | None


class Dialect(Protocol):
    """Builds into `graph`. Hidden states are [B, S, H]; see `build.py` for the contract of each dialect."""

    name: Literal["contrib", "opset24", "opset17"]
    kv_mode: Literal["in_place", "append"]
    graph: GraphBuilder
    inputs_embeds: ir.Value
    logits_indices: ir.Value

    def norm(
        self, name: str, weight: ir.Value, hidden: ir.Value, residual: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of hidden + residual; returns (normed, sum)."""
        ...

    def attention(self, layer: int, qkv: ir.Value, qk_norm: Norms) -> ir.Value:
        """Rotary embedding, cache update and attention over packed q, k, v [B, S, (heads + 2·kv_heads)·D].

        `qk_norm` holds the scales [D] of the norms of q and k. Returns [B, S, heads·D].
        """
        ...

    def silu(self, name: str, x: ir.Value) -> ir.Value:
        """x · sigmoid(x)."""
        ...

    def pick_rows(self, name: str, x: ir.Value) -> ir.Value:
        """x [B, S, H] at `logits_indices` [B, K] → [B, K, H]."""
        ...

    def finish(self, logits: ir.Value) -> ir.Model:
        """Declare the outputs and return the graph."""
        ...
