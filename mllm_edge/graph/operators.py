"""Operators that every runtime has: reshaping, picking rows, plain attention, norms and activations written out."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.decoder_spec import Activation, AttentionSpec

__all__ = [
    "gelu",
    "grouped",
    "grouped_attention",
    "heads_first",
    "merge_heads",
    "pick_rows",
    "reshape",
    "rms_normed",
    "rows_between",
    "shared",
    "simple_activation",
    "softcap",
    "split_query_key",
    "times",
    "unsqueeze",
    "weights_of",
]

_INT64 = ir.DataType.INT64


def simple_activation(graph: GraphBuilder, name: str, kind: Activation, x: ir.Value) -> ir.Value | None:
    """relu and relu² (the same everywhere); None for any other."""
    if kind == "relu":
        return graph.node("Relu", [x], name)
    if kind == "relu2":
        positive = graph.node("Relu", [x], f"{name}.relu")
        return graph.node("Mul", [positive, positive], name)
    return None


def split_query_key(
    graph: GraphBuilder, name: str, query_key: ir.Value, attention: AttentionSpec
) -> tuple[ir.Value, ir.Value]:
    """Packed projections [B, S, (heads + kv_heads)·D] → q, k [B, S, ·]."""
    sizes = np.array([attention.heads, attention.kv_heads], np.int64) * attention.head_dim
    query, key = graph.nodes(
        "Split", [query_key, graph.constant("query_key.sizes", sizes)], f"{name}.query_key", outputs=2, axis=-1
    )
    return query, key


def reshape(graph: GraphBuilder, name: str, x: ir.Value, shape: Sequence[int]) -> ir.Value:
    """Reshape; 0 keeps a dimension, −1 takes the rest."""
    target = graph.constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))
    return graph.node("Reshape", [x, target], name)


def unsqueeze(graph: GraphBuilder, name: str, x: ir.Value, axis: int) -> ir.Value:
    """A new axis of size 1."""
    return graph.node("Unsqueeze", [x, graph.constant(f"axis.{axis}", np.array([axis], np.int64))], name)


def heads_first(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[B, S, heads, D] → [B, heads, S, D], and back."""
    return graph.node("Transpose", [x], name, perm=[0, 2, 1, 3])


def merge_heads(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[B, S, heads, D] → [B, S, heads·D]."""
    return reshape(graph, name, x, (0, 0, -1))


def pick_rows(graph: GraphBuilder, name: str, x: ir.Value, indices: ir.Value) -> ir.Value:
    """x [B, S, H] at `indices` [B, K] → [B, K, H]."""
    index = unsqueeze(graph, f"{name}.index", indices, -1)
    return graph.node("GatherND", [x, index], name, batch_dims=1)


def rows_between(graph: GraphBuilder, name: str, x: ir.Value, start: int, end: int | None) -> ir.Value:
    """x[:, start:end] of [B, S, H]; negative numbers count from the end, None is the end."""
    ends = np.iinfo(np.int64).max if end is None else end
    parts = (("start", start), ("end", ends), ("axis", 1))
    given = [graph.constant(f"rows.{part}.{n}", np.array([n], np.int64)) for part, n in parts]
    return graph.node("Slice", [x, *given], name)


def softcap(graph: GraphBuilder, name: str, x: ir.Value, cap: float, dtype: ir.DataType) -> ir.Value:
    """cap · tanh(x / cap)."""
    bound = graph.constant(f"softcap.{cap:g}.{dtype.name}", np.array(cap, dtype.numpy()))
    curve = graph.node("Tanh", [graph.node("Div", [x, bound], f"{name}.share")], f"{name}.tanh")
    return graph.node("Mul", [curve, bound], name)


def grouped(graph: GraphBuilder, name: str, query: ir.Value, attention: AttentionSpec) -> ir.Value:
    """[B, S, heads, D] or [B, S, heads·D] → [B, Hkv, G, S, D]: the G heads that share keys stand together, so no key is
    repeated."""
    groups = attention.heads // attention.kv_heads
    split = reshape(graph, f"{name}.split", query, (0, 0, attention.kv_heads, groups, attention.head_dim))
    return graph.node("Transpose", [split], f"{name}.groups", perm=[0, 2, 3, 1, 4])


def shared(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[B, Hkv, …] → [B, Hkv, 1, …]: one matrix (or bias) for all heads of a group."""
    return unsqueeze(graph, name, x, 2)


def weights_of(graph: GraphBuilder, name: str, attention: AttentionSpec, scores: ir.Value, bias: ir.Value) -> ir.Value:
    """Scale, cap, add the bias [B, 1, 1, S, N] and take the softmax over the last axis of [B, Hkv, G, S, N]."""
    dtype = graph.float_type
    if attention.scale != 1:
        scale = graph.constant(f"score.scale.{attention.scale:.9g}", np.array(attention.scale, dtype.numpy()))
        scores = graph.node("Mul", [scores, scale], f"{name}.scaled")
    if attention.softcap is not None:
        scores = softcap(graph, f"{name}.capped", scores, attention.softcap, dtype)
    return graph.node("Softmax", [graph.node("Add", [scores, bias], f"{name}.biased")], f"{name}.weights", axis=-1)


def grouped_attention(
    graph: GraphBuilder,
    name: str,
    attention: AttentionSpec,
    query: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    bias: ir.Value,
) -> ir.Value:
    """Attention in primitives: query [B, S, heads·D] over keys and values [B, Hkv, N, D] with bias [B, 1, 1, S, N] (or
    [B, heads, 1, S, N], where every head has keys of its own) → [B, S, heads·D]."""
    columns = graph.node("Transpose", [keys], f"{name}.transposed", perm=[0, 1, 3, 2])
    groups = grouped(graph, f"{name}.query", query, attention)
    scores = graph.node("MatMul", [groups, shared(graph, f"{name}.shared.columns", columns)], f"{name}.scores")
    weights = weights_of(graph, name, attention, scores, bias)
    total = graph.node("MatMul", [weights, shared(graph, f"{name}.shared.values", values)], f"{name}.total")
    return merge_heads(graph, name, graph.node("Transpose", [total], f"{name}.rows", perm=[0, 3, 1, 2, 4]))


def gelu(graph: GraphBuilder, name: str, x: ir.Value, tanh: bool) -> ir.Value:
    """x/2 · (1 + erf(x/√2)), or with tanh of √(2/π)·(x + 0.044715 x³) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    inner, factor = (_cubic(graph, name, x), (2 / np.pi) ** 0.5) if tanh else (x, 0.5**0.5)
    curve = graph.node("Tanh" if tanh else "Erf", [times(graph, f"{name}.scaled", inner, factor)], f"{name}.curve")
    one = graph.constant("one", np.array(1, graph.float_type.numpy()))
    plus = graph.node("Add", [curve, one], f"{name}.plus")
    return graph.node("Mul", [times(graph, f"{name}.half", x, 0.5), plus], name)


def rms_normed(graph: GraphBuilder, name: str, x: ir.Value, eps: float) -> ir.Value:
    """x / √(mean(x²) + eps) over the last axis, x in float32."""
    square = graph.node("Mul", [x, x], f"{name}.square")
    axis = graph.constant("norm.axis", np.array([-1], np.int64))
    mean = graph.node("ReduceMean", [square, axis], f"{name}.mean")
    offset = graph.constant(f"norm.eps.{eps:g}", np.array(eps, np.float32))
    root = graph.node("Sqrt", [graph.node("Add", [mean, offset], f"{name}.variance")], f"{name}.root")
    return graph.node("Div", [x, root], f"{name}.normed")


def times(graph: GraphBuilder, name: str, x: ir.Value, factor: float) -> ir.Value:
    """x · factor, in the graph's float type."""
    value = graph.constant(f"factor.{factor:.9g}", np.array(factor, graph.float_type.numpy()))
    return graph.node("Mul", [x, value], name)


def _cubic(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    cube = graph.node("Mul", [graph.node("Mul", [x, x], f"{name}.square"), x], f"{name}.cube")
    return graph.node("Add", [x, times(graph, f"{name}.cubic", cube, 0.044715)], f"{name}.inner")
