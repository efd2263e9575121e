"""What the runs of a graph need beside its weights on the CPU: its tensors in ONNX Runtime's arena.

ONNX Runtime gives each tensor memory when it is made, lets a later one of the same shape have it once nobody reads it
any more, and computes some operators in place. Operators take working memory of their own. What a fusion saves is not
seen: the graph is taken as it is written.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm_edge.runtime.onnx_file.cost import Graph, Node
from mllm_edge.runtime.onnx_file.expressions import dimension
from mllm_edge.runtime.planning.arena import Arena

__all__ = ["arena_bytes"]

Shape = tuple[int, ...]

_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # of a value, by TensorProto.DataType
_FLOAT = 1
# Their output is their first input under another name.
_SAME = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
_IN_PLACE = {"Relu", "Sigmoid", "Tanh", "Sqrt", "Neg", "Abs", "Clip", "Erf"}
_SMALL = {"Shape", "Constant", "Range", "Size"}
_SCORES = 1 << 20  # at a time, of attention in 8 bits
_MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze"}
_ELEMENTS = {"Add", "Sub", "Mul", "Div", "Where", "Pow", "Min", "Max"}
_NORMS = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


def arena_bytes(graph: Graph, runs: Sequence[Mapping[str, int]]) -> int:
    """Bytes that the arena of a session has touched behind these runs, each with the numbers of symbolic dimensions."""
    arena, kept = Arena(), list[int]()
    for i, sizes in enumerate(runs):
        if i > 1 and sizes == runs[i - 1] == runs[i - 2]:
            continue  # nothing new
        for handle in kept:
            arena.free(handle)  # the caller has the outputs of a run until the next one
        kept = _Run(graph, sizes).work(arena)
    return arena.touched


@dataclass
class _Buffer:
    """Memory that several tensors have, one after the other: made by node `first`, given back behind node `last`."""

    shape: Shape
    nbytes: int
    first: int
    last: int
    readers: int = 0


@dataclass
class _Run:
    graph: Graph
    sizes: Mapping[str, int]
    shapes: dict[str, Shape] = field(default_factory=dict)
    of: dict[str, _Buffer] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)

    def work(self, arena: Arena) -> list[int]:
        """Allocate and free as the nodes do, in their order; the handles of the outputs."""
        readers = Counter(name for node in self.graph.nodes for name in node.inputs)
        free: list[_Buffer] = []
        for i, node in enumerate(self.graph.nodes):
            self._place(i, node, readers, free)
        held: dict[int, int] = {}
        for i, node in enumerate(self.graph.nodes):
            made = {id(b): b for b in (self.of[name] for name in node.outputs if name in self.of) if b.first == i}
            early = [arena.allocate(nbytes) for nbytes in self._before(node)]
            held |= {key: arena.allocate(buffer.nbytes) for key, buffer in made.items()}
            late = [arena.allocate(nbytes) for nbytes in self._behind(node)]
            for handle in (*early, *late):
                arena.free(handle)
            for buffer in {id(self.of[n]): self.of[n] for n in (*node.inputs, *node.outputs) if n in self.of}.values():
                if buffer.last == i and id(buffer) in held:
                    arena.free(held.pop(id(buffer)))
        return list(held.values())

    def _place(self, i: int, node: Node, readers: Counter[str], free: list[_Buffer]) -> None:
        """Give the outputs of a node their buffers. What is made of weights alone is made when a graph is opened."""
        sources = [name for name in node.inputs if name in self.of]
        if node.inputs and all(not name or name in self.graph.weights or name in self.folded for name in node.inputs):
            self.folded |= set(node.outputs)
            self.shapes |= {name: self.shape(name) or self._made(node, name) for name in node.outputs if name}
            return
        for name in filter(None, node.outputs):
            shape = self.shapes[name] = self.shape(name) or self._made(node, name)
            buffer = self._reused(node, shape, sources, free)
            if buffer is None:
                told = self.graph.tensors.get(name)
                nbytes = math.prod(shape) * _BYTES.get(_FLOAT if told is None else told.dtype, 4)
                outside = any(part in name for part in ("present.", "present_"))  # the decoder's cache has it
                buffer = _Buffer(shape, 0 if outside else nbytes, i, len(self.graph.nodes))
            self.of[name] = buffer
            buffer.readers += readers[name] or len(self.graph.nodes)  # nobody: an output
        for name in sources:
            buffer = self.of[name]
            buffer.readers -= 1
            if not buffer.readers:
                buffer.last = i
                free.append(buffer)

    def _reused(self, node: Node, shape: Shape, sources: Sequence[str], free: list[_Buffer]) -> _Buffer | None:
        if node.kind in _SAME:
            return self.of[sources[0]] if sources else None
        if node.kind in _IN_PLACE:
            for name in sources:
                if self.of[name].readers == 1 and self.shapes.get(name) == shape:
                    return self.of[name]
        for buffer in reversed(free):
            if buffer.shape == shape:
                free.remove(buffer)
                buffer.last = len(self.graph.nodes)
                return buffer
        return None

    def shape(self, name: str) -> Shape | None:
        """A tensor's shape as the file tells it, or as it was found; None where neither does."""
        told = self.graph.weights.get(name) or self.graph.tensors.get(name)
        if told is not None:
            sizes = [dimension(d, self.sizes) for d in told.shape]
            known = tuple(size for size in sizes if size is not None)
            if len(known) == len(sizes) and (known or name not in self.shapes):
                return known
        return self.shapes.get(name)

    def _made(self, node: Node, name: str) -> Shape:
        """The shape of an output that the file does not tell."""
        inputs = [self.shape(n) or () for n in node.inputs]
        if node.kind in _SMALL or not inputs:
            return (8,)
        data = inputs[0]
        if node.kind in _MOVES:
            return _moved(node, data, self.graph.constants.get(node.inputs[-1]))
        if node.kind == "MatMulNBits":
            return (*data[:-1], node.numbers["N"])
        if node.kind in ("MatMul", "DynamicQuantizeMatMul", "FusedMatMul") and len(inputs[1]) > 1:
            if len(data) < 2 or data[-1] != inputs[1][-2]:
                return (math.prod(data) // max(1, inputs[1][-2]), inputs[1][-1])
            return (*_broadcast(data[:-2], inputs[1][:-2]), data[-2], inputs[1][-1])
        if node.kind == "Concat":
            axis = node.numbers.get("axis", 0)
            return (*data[:axis], sum(s[axis] for s in inputs), *data[axis:][1:]) if len(data) > abs(axis) else (8,)
        if node.kind == "Split":
            axis, parts = node.numbers.get("axis", 0), sum(map(bool, node.outputs))
            return _with(data, axis, -(-data[axis] // parts)) if data else ()
        if node.kind == "GroupQueryAttention" and name == node.outputs[0]:
            heads, shared = node.numbers["num_heads"], node.numbers["kv_num_heads"]
            return data if node.inputs[1] else (*data[:-1], data[-1] * heads // (heads + 2 * shared))
        if node.kind in _NORMS and name not in (node.outputs[0], node.outputs[-1]):
            return (1,)
        if node.kind == "GatherND":
            return (*inputs[1][:-1], *data[-1:])
        return _broadcast(*inputs) if node.kind in _ELEMENTS else max(inputs, key=math.prod)

    def _before(self, node: Node) -> Iterator[int]:
        """Bytes that an operator works in and takes before its output."""
        if node.kind == "DynamicQuantizeMatMul":
            yield math.prod(self.shape(node.inputs[0]) or ())
        if node.kind == "Conv" and self._leaves_channels(node.outputs[0]):
            yield 4 * math.prod(self.shape(node.outputs[0]) or ())

    def _leaves_channels(self, name: str) -> bool:
        """Whether an image stops being one: convolutions make channels in blocks, which are put in order then."""
        return any(name in node.inputs and node.kind in (*_SAME, "Transpose") for node in self.graph.nodes)

    def _behind(self, node: Node) -> Iterator[int]:
        """Bytes that an operator works in and takes behind its output."""
        if node.kind == "MultiHeadAttention":
            query, *others = (math.prod(self.shape(name) or ()) for name in node.inputs[:3])
            yield from (4 * query, *(4 * other for other in others))
            if len(node.inputs) > 5 and any(node.inputs[3:6]):  # with a bias all scores are kept
                yield from self._scores(node)
        if node.kind == "Scan":  # over heads: scores, their softmax, its codes
            rows, keys = (self.shape(name) or () for name in node.inputs[:2])
            scores = rows[2] * keys[2] if len(rows) == 4 and len(keys) == 3 else _SCORES
            yield from (4 * scores, 4 * scores, scores)
        if node.kind == "GroupQueryAttention":
            packed = 4 * sum(math.prod(self.shape(name) or ()) for name in node.inputs[:3] if name)
            yield packed
            if node.numbers.get("do_rotary"):
                yield packed

    def _scores(self, node: Node) -> Iterator[int]:
        query, key = (self.shape(name) or () for name in node.inputs[:2])
        if len(query) == len(key) == 3:
            yield 4 * node.numbers.get("num_heads", 1) * query[0] * query[1] * key[1]


def _with(shape: Shape, axis: int, size: int) -> Shape:
    axis %= len(shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _broadcast(*shapes: Shape) -> Shape:
    """The shape that values of several shapes have together; the largest, where they do not fit."""
    try:
        return tuple(np.broadcast_shapes(*shapes))
    except ValueError:
        return max(shapes, key=math.prod)


def _moved(node: Node, data: Shape, told: tuple[int, ...] | None) -> Shape:
    """The shape behind an operator that keeps all values; a row of them, where the file does not tell how."""
    if node.kind == "Transpose":
        order = node.lists.get("perm", tuple(reversed(range(len(data)))))
        return tuple(data[i] for i in order) if len(order) == len(data) else data
    if told is None or not data:
        return (math.prod(data),)
    if node.kind == "Reshape":
        sizes = [data[i] if size == 0 and i < len(data) else size for i, size in enumerate(told)]
        rest = math.prod(data) // max(1, math.prod(size for size in sizes if size > 0))
        return tuple(rest if size < 0 else size for size in sizes)
    if node.kind == "Squeeze":
        return tuple(size for i, size in enumerate(data) if i not in told and i - len(data) not in told)
    axes, sizes = {axis % (len(data) + len(told)) for axis in told}, list(data)
    return tuple(1 if i in axes else sizes.pop(0) for i in range(len(data) + len(told)))
