"""The largest logits as outputs of a decoder's engine, which its graph does not have."""

from typing import Any

from mllm_edge.runtime.backends.top_logits import IDS, SUM, VALUES
from mllm_edge.spec import TensorSpec

__all__ = ["add_best", "best_outputs"]

# Of each row; samplers that keep fewer need no others.
_BEST = 64


def add_best(trt: Any, network: Any) -> None:
    """Add them to a parsed network, computed from its output `logits` [B, K, V], which stays."""
    (logits,) = [t for i in range(network.num_outputs) if (t := network.get_output(i)).name == "logits"]
    axis = len(logits.shape) - 1
    top = network.add_topk(logits, trt.TopKOperation.MAX, min(_BEST, logits.shape[axis]), 1 << axis)
    total = network.add_reduce(logits, trt.ReduceOperation.SUM, 1 << axis, True)
    top.name, total.name = "TopK of logits", "Sum of logits"
    for name, tensor in ((VALUES, top.get_output(0)), (IDS, top.get_output(1)), (SUM, total.get_output(0))):
        tensor.name = name
        network.mark_output(tensor)


def best_outputs(engine: Any, names: list[str]) -> tuple[TensorSpec, ...]:
    """Those that an engine with tensors of these names has: all, or none when it was built without them."""
    if VALUES not in names:
        return ()
    count = int(engine.get_tensor_shape(VALUES)[-1])
    return (
        TensorSpec(VALUES, "float32", ("batch", "rows", count)),
        TensorSpec(IDS, "int32", ("batch", "rows", count)),
        TensorSpec(SUM, "float32", ("batch", "rows", 1)),
    )
