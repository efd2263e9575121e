"""What ONNX Runtime on the CPU keeps of a graph's weights, and what it needs for a moment while it opens it.

It packs the matrices that it multiplies by into copies of its own, and lets the stored ones go. Beside that, as
measured with 1.32 over graphs of 3 to 3200 nodes: scales of blocks stay, and come a second time with sums that the
products need; half-precision weights become single; and of convolutions, whose channels it puts in another order, half
of what the first order took stays with the process.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mllm_edge.runtime.onnx_file.cost import Graph, Tensor

__all__ = ["Weights", "weights_of"]

_HALF = (10, 16)  # TensorProto.DataType
_NODE = 4 << 10  # bytes of a node of the opened graph
_GRAPH = 1 << 20  # of a graph
_BLOCK = 9  # bytes of a block's scale, of its copy and its sum


@dataclass(frozen=True)
class Weights:
    """Bytes: those that stay, and those that opening needs beside them for a moment."""

    resident: int
    opening: int


def weights_of(graph: Graph) -> Weights:
    """Of the graph of a component."""
    stored = sum(map(_single, graph.weights.values()))
    blocks = sum(math.prod(map(int, scale.shape)) for scale in _scales(graph))
    convolved = sum(
        graph.weights[node.inputs[1]].nbytes
        for node in graph.nodes
        if node.kind == "Conv" and node.inputs[1] in graph.weights
    )
    kept = stored + _BLOCK * blocks + convolved // 2 + _NODE * len(graph.nodes) + _GRAPH
    largest = max(map(_single, graph.weights.values()), default=0)
    return Weights(kept, max(largest, convolved // 2))


def _scales(graph: Graph) -> Iterator[Tensor]:
    """Of weights in blocks."""
    for node in graph.nodes:
        if node.kind == "MatMulNBits" and node.inputs[2] in graph.weights:
            yield graph.weights[node.inputs[2]]


def _single(tensor: Tensor) -> int:
    """Bytes, of half-precision weights in single precision."""
    return tensor.nbytes * (2 if tensor.dtype in _HALF else 1)
