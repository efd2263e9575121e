"""The `contrib` dialect: ONNX Runtime's own fused operators, the fastest form on its CPU and CUDA providers."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mllm_edge.export.datafile import DataSink
from mllm_edge.export.decoder.spec import DecoderSpec
from mllm_edge.export.graph import MICROSOFT, GraphBuilder

__all__ = ["MINIMUM", "Step", "attention", "inputs", "new_graph", "norm", "outputs", "pick_rows", "silu"]

MINIMUM = {"onnxruntime": "1.23"}
_FLOAT, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


@dataclass
class Step:
    """The graph's inputs, and the updated caches as the layers produce them."""

    inputs_embeds: ir.Value
    logits_indices: ir.Value
    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    cos: ir.Value
    sin: ir.Value
    past: list[tuple[ir.Value, ir.Value]]
    present: list[tuple[ir.Value, ir.Value]]


def new_graph(data: DataSink) -> GraphBuilder:
    """An empty decoder graph of this dialect."""
    return GraphBuilder("decoder", 17, data, {MICROSOFT: 1})


def inputs(graph: GraphBuilder, spec: DecoderSpec) -> Step:
    """Declare the inputs of the contract."""
    cache = ("batch", spec.kv_heads, "capacity", spec.head_dim)
    table = ("positions", spec.rope.dim // 2)
    return Step(
        inputs_embeds=graph.input("inputs_embeds", _FLOAT, ("batch", "sequence", spec.hidden_size)),
        logits_indices=graph.input("logits_indices", _INT64, ("batch", "rows")),
        seqlens_k=graph.input("seqlens_k", _INT32, ("batch",)),
        total_sequence_length=graph.input("total_sequence_length", _INT32, ()),
        cos=graph.input("cos", _FLOAT, table),
        sin=graph.input("sin", _FLOAT, table),
        past=[
            (
                graph.input(f"past_key_values.{i}.key", _FLOAT, cache),
                graph.input(f"past_key_values.{i}.value", _FLOAT, cache),
            )
            for i in range(spec.layers)
        ],
        present=[],
    )


def outputs(graph: GraphBuilder, spec: DecoderSpec, logits: ir.Value, step: Step) -> None:
    """Declare the outputs of the contract."""
    graph.output(logits, "logits", _FLOAT, ("batch", "rows", spec.vocab_size))
    cache = ("batch", spec.kv_heads, "capacity", spec.head_dim)
    for i, (key, value) in enumerate(step.present):
        graph.output(key, f"present.{i}.key", _FLOAT, cache)
        graph.output(value, f"present.{i}.value", _FLOAT, cache)


def norm(
    graph: GraphBuilder, name: str, weight: ir.Value, spec: DecoderSpec, hidden: ir.Value, residual: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """RMS norm of hidden + residual; returns (normed, sum)."""
    if residual is None:
        inputs_: list[ir.Value | None] = [hidden, weight]
        return graph.node("SimplifiedLayerNormalization", inputs_, name, epsilon=spec.norm_eps, axis=-1), hidden
    inputs_ = [hidden, residual, weight]
    results = graph.nodes(
        "SkipSimplifiedLayerNormalization", inputs_, name, MICROSOFT, outputs=4, epsilon=spec.norm_eps
    )
    # Outputs 1 and 2 (mean and inverse deviation, for training) stay unnamed: they are never computed.
    results[1].name = results[2].name = ""
    return results[0], results[3]


def attention(graph: GraphBuilder, name: str, spec: DecoderSpec, layer: int, qkv: ir.Value, step: Step) -> ir.Value:
    """Rotary embedding, cache update and causal attention in one operator; [B, S, heads·head_dim]."""
    key, value = step.past[layer]
    results = graph.nodes(
        "GroupQueryAttention",
        [qkv, None, None, key, value, step.seqlens_k, step.total_sequence_length, step.cos, step.sin],
        name,
        MICROSOFT,
        outputs=3,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=spec.head_dim**-0.5,
    )
    step.present.append((results[1], results[2]))
    return results[0]


def silu(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """x · sigmoid(x)."""
    return graph.node("QuickGelu", [x], name, MICROSOFT, alpha=1.0)


def pick_rows(graph: GraphBuilder, x: ir.Value, indices: ir.Value, name: str) -> ir.Value:
    """x [B, S, H] at `indices` [B, K] → [B, K, H]."""
    last = graph.constant("axis.last", np.array([-1], np.int64))
    index = graph.node("Unsqueeze", [indices, last], f"{name}.index")
    return graph.node("GatherND", [x, index], name, batch_dims=1)
