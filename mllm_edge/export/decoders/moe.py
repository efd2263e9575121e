"""Mixture of experts: from router logits to the share that each expert has in each token."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mllm_edge.graph.builder import GraphBuilder
from mllm_edge.graph.decoder_spec import MoeSpec

__all__ = ["dense_routing"]

_FLOAT = ir.DataType.FLOAT


def dense_routing(graph: GraphBuilder, name: str, logits: ir.Value, spec: MoeSpec) -> Sequence[ir.Value]:
    """Router logits [B, S, E] → the share [B, S, 1] of each of the E experts, 0 for those that were not chosen.

    Softmax and choice are made in float32: in half precision other experts may win.
    """
    probabilities = graph.node("Softmax", [graph.cast(logits, _FLOAT, f"{name}.logits")], f"{name}.softmax", axis=-1)
    top_k = graph.constant(f"top_k.{spec.top_k}", np.array([spec.top_k], np.int64))
    chosen, experts = graph.nodes("TopK", [probabilities, top_k], f"{name}.top_k", outputs=2, axis=-1)
    if spec.renormalize:
        last = graph.constant("axis.-1", np.array([-1], np.int64))
        total = graph.node("ReduceSum", [chosen, last], f"{name}.total", keepdims=1)
        chosen = graph.node("Div", [chosen, total], f"{name}.chosen")
    if spec.scale != 1:
        factor = graph.constant(f"moe.scale.{spec.scale:.9g}", np.array(spec.scale, np.float32))
        chosen = graph.node("Mul", [chosen, factor], f"{name}.scaled")
    none = graph.node("Mul", [probabilities, graph.constant("zero", np.array(0, np.float32))], f"{name}.none")
    dense = graph.node("ScatterElements", [none, experts, chosen], f"{name}.dense", axis=-1)
    if graph.float_type != _FLOAT:
        dense = graph.node("Cast", [dense], f"{name}.shares", to=graph.float_type)
    ones = graph.constant(f"moe.sizes.{spec.experts}", np.ones(spec.experts, np.int64))
    return graph.nodes("Split", [dense, ones], f"{name}.share", outputs=spec.experts, axis=-1)
