"""Pieces that the dialects share: inputs and outputs of the contract, reshaping, picking rows."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mllm_edge.export.decoder.spec import Activation, AttentionSpec, DecoderSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = [
    "cache_inputs",
    "cache_outputs",
    "heads_first",
    "logits_output",
    "merge_heads",
    "pick_rows",
    "reshape",
    "simple_activation",
    "split_qkv",
    "token_inputs",
]

_INT64 = ir.DataType.INT64


def token_inputs(graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """inputs_embeds [B, S, H] and logits_indices [B, K]."""
    embeds = graph.input("inputs_embeds", dtype, ("batch", "sequence", spec.hidden_size))
    return embeds, graph.input("logits_indices", _INT64, ("batch", "rows"))


def cache_inputs(
    graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType, shape: Sequence[int | str]
) -> list[tuple[ir.Value, ir.Value]]:
    """past_key_values.N.key and .value for every layer."""
    return [
        (
            graph.input(f"past_key_values.{i}.key", dtype, shape),
            graph.input(f"past_key_values.{i}.value", dtype, shape),
        )
        for i in range(spec.layers)
    ]


def cache_outputs(
    graph: GraphBuilder,
    present: Sequence[tuple[ir.Value, ir.Value]],
    dtype: ir.DataType,
    shape: Sequence[int | str],
) -> None:
    """present.N.key and .value for every layer."""
    for i, (key, value) in enumerate(present):
        graph.output(key, f"present.{i}.key", dtype, shape)
        graph.output(value, f"present.{i}.value", dtype, shape)


def logits_output(graph: GraphBuilder, spec: DecoderSpec, logits: ir.Value) -> None:
    """logits [B, K, V] float32."""
    graph.output(logits, "logits", ir.DataType.FLOAT, ("batch", "rows", spec.vocab_size))


def simple_activation(graph: GraphBuilder, name: str, kind: Activation, x: ir.Value) -> ir.Value | None:
    """relu and relu² (the same everywhere); None for any other."""
    if kind == "relu":
        return graph.node("Relu", [x], name)
    if kind == "relu2":
        positive = graph.node("Relu", [x], f"{name}.relu")
        return graph.node("Mul", [positive, positive], name)
    return None


def split_qkv(
    graph: GraphBuilder, name: str, qkv: ir.Value, attention: AttentionSpec
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Packed projections [B, S, (heads + 2·kv_heads)·D] → q, k, v [B, S, ·]."""
    sizes = np.array([attention.heads, attention.kv_heads, attention.kv_heads], np.int64) * attention.head_dim
    query, key, value = graph.nodes(
        "Split", [qkv, graph.constant("qkv.sizes", sizes)], f"{name}.qkv", outputs=3, axis=-1
    )
    return query, key, value


def reshape(graph: GraphBuilder, name: str, x: ir.Value, shape: Sequence[int]) -> ir.Value:
    """Reshape; 0 keeps a dimension, −1 takes the rest."""
    target = graph.constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))
    return graph.node("Reshape", [x, target], name)


def heads_first(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[B, S, heads, D] → [B, heads, S, D]."""
    return graph.node("Transpose", [x], name, perm=[0, 2, 1, 3])


def merge_heads(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[B, S, heads, D] → [B, S, heads·D]."""
    return reshape(graph, name, x, (0, 0, -1))


def pick_rows(graph: GraphBuilder, name: str, x: ir.Value, indices: ir.Value) -> ir.Value:
    """x [B, S, H] at `indices` [B, K] → [B, K, H]."""
    last = graph.constant("axis.last", np.array([-1], np.int64))
    index = graph.node("Unsqueeze", [indices, last], f"{name}.index")
    return graph.node("GatherND", [x, index], name, batch_dims=1)
