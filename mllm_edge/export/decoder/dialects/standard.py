"""Pieces that the dialects share: inputs and outputs of the contract, reshaping, picking rows, plain attention."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mllm_edge.export.decoder.dialect import Dialect, Norm
from mllm_edge.export.decoder.spec import Activation, AttentionSpec, DecoderSpec
from mllm_edge.export.graph import GraphBuilder

__all__ = [
    "bias_inputs",
    "cache_inputs",
    "cache_outputs",
    "gelu",
    "grouped",
    "grouped_attention",
    "heads_first",
    "logits_output",
    "merge_heads",
    "normed_heads",
    "narrowed",
    "numbered",
    "pick_rows",
    "reshape",
    "residual_sum",
    "rms_normed",
    "rope_inputs",
    "shared",
    "simple_activation",
    "softcap",
    "split_query_key",
    "times",
    "unsqueeze",
    "weights_of",
]

_INT64 = ir.DataType.INT64


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
    """past_key_values.N.key and .value for every layer with self-attention."""
    return [
        (
            graph.input(f"past_key_values.{i}.key", dtype, shape),
            graph.input(f"past_key_values.{i}.value", dtype, shape),
        )
        for i in range(spec.cached)
    ]


def cache_outputs(
    graph: GraphBuilder,
    present: Sequence[tuple[ir.Value, ir.Value]],
    dtype: ir.DataType,
    shape: Sequence[int | str],
) -> None:
    """present.N.key and .value for every layer with self-attention."""
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


def rope_inputs(graph: GraphBuilder, spec: DecoderSpec, dtype: ir.DataType) -> list[list[ir.Value]]:
    """cos and sin [B, S, R/2] for every rope: the rows of the new tokens."""
    return [
        [graph.input(numbered(part, k), dtype, ("batch", "sequence", rope.dim // 2)) for part in ("cos", "sin")]
        for k, rope in enumerate(spec.ropes)
    ]


def residual_sum(ops: Dialect, name: str, hidden: ir.Value, residual: ir.Value | None) -> ir.Value:
    """hidden (T) + residual, in the residual stream's type."""
    graph = ops.graph
    if ops.residual_type != graph.float_type:
        hidden = graph.node("Cast", [hidden], f"{name}.wide.hidden", to=ops.residual_type)
    return hidden if residual is None else graph.node("Add", [hidden, residual], f"{name}.sum")


def narrowed(ops: Dialect, name: str, x: ir.Value) -> ir.Value:
    """x of the residual stream's type, in the graph's."""
    if ops.residual_type == ops.graph.float_type:
        return x
    return ops.graph.node("Cast", [x], f"{name}.narrowed", to=ops.graph.float_type)
