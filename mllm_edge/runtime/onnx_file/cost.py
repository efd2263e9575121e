"""What one run of an ONNX graph must read and compute, from the file alone: without the onnx package or an engine.

Bytes are the least that a run moves: every weight once as it is stored, and no activations, which caches mostly hold.
Arithmetic is that of the products: with weights, and of attention with itself; all else is small beside them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_edge.errors import BundleError
from mllm_edge.runtime.onnx_file.protobuf import BYTES, VARINT, fields, read_varint
from mllm_edge.spec import is_cross

__all__ = ["Graph", "GraphCost", "Node", "Tensor", "graph_cost", "read_graph"]

# Bits of a value by TensorProto.DataType; strings have none.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_HALF, _INT64 = (10, 16), 7
_FEW = 8  # values
_INT8 = {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger"}
_INT8 |= {"QLinearMatMul", "QLinearConv", "QGemm"}
_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "MatMulNBits"} | _INT8
_MATRICES = {"MatMul", "FusedMatMul"}
_LOOPED = "Scan"  # over heads: attention in 8-bit products
_ATTENTION = {"Attention", "GroupQueryAttention", "MultiHeadAttention", _LOOPED}
# Nodes that hand a weight on to a product.
_PASS = {"DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose"}


@dataclass(frozen=True)
class Tensor:
    """Type (a TensorProto.DataType) and shape; a dimension is a number, a symbol, or "" when it is not told."""

    dtype: int
    shape: tuple[int | str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor all of whose dimensions are numbers."""
        return math.ceil(math.prod(int(d) for d in self.shape) * _BITS.get(self.dtype, 0) / 8)


@dataclass(frozen=True)
class Node:
    """An operator; `numbers` are its attributes that are integers, `lists` those that are several."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]
    lists: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in order; `weights` are the initializers, `tensors` all others whose shapes the file tells. `constants`:
    the values of initializers that are a few int64, such as shapes and axes."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphCost:
    """Of one run. `weight_bytes` as stored, with scales and zero points; `flops` by the numbers' type (float32,
    float16, int8): 2 for each multiplication and addition."""

    weight_bytes: int
    flops: Mapping[str, float]


def read_graph(path: Path) -> Graph:
    """Read a serialized graph; weights in other files are not opened. Raises BundleError when it is damaged."""
    try:
        model = path.read_bytes()
        graph = next(model[content] for number, _, _, content in fields(model) if number == 7)
        return _graph(graph)
    except (IndexError, ValueError, StopIteration) as e:
        raise BundleError(f"{path}: the graph is damaged ({e})", "check it with `mllm-edge inspect --verify`") from e


def graph_cost(graph: Graph, sizes: Mapping[str, float], rows: float, pairs: float, crossed: float = 0.0) -> GraphCost:
    """The cost of a run, or the mean one of several. `sizes`: the numbers for symbolic dimensions; `rows`: tokens that
    a product takes where the graph does not tell; `pairs`: of tokens that see each other in a layer's attention, in all
    sequences together; `crossed`: of tokens and what cross-attention shows them."""
    return _Counter(graph, sizes, rows).cost(pairs, crossed)


@dataclass
class _Counter:
    graph: Graph
    sizes: Mapping[str, float]
    rows: float
    users: dict[str, list[Node]] = field(default_factory=dict)
    makers: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)
            self.makers.update(dict.fromkeys(node.outputs, node))

    def cost(self, pairs: float, crossed: float) -> GraphCost:
        flops: dict[str, float] = {}
        for node in self.graph.nodes:
            weight = self._weight(node)
            if weight is not None:
                count = 2.0 * self._products(node, weight)
            elif node.kind in _ATTENTION:
                count = 4.0 * (crossed if self._crosses(node) else pairs) * self._width(node)
            elif node.kind in _MATRICES:  # scores, or the values that they weigh
                count = 2.0 * (crossed if self._crosses(node) else pairs) * self._width(node) / self._parts(node)
            else:
                continue
            kind = _arithmetic(node, weight)
            flops[kind] = flops.get(kind, 0.0) + count
        return GraphCost(sum(self._read(name) for name in self.graph.weights), flops)

    def _read(self, name: str) -> int:
        """Bytes of a weight that a run reads: all, unless only rows of it are gathered."""
        tensor, users = self.graph.weights[name], self.users.get(name, [])
        if not users:
            return 0
        if tensor.shape and all(user.kind == "Gather" and user.inputs[0] == name for user in users):
            return min(tensor.nbytes, int(self.rows * tensor.nbytes // max(1, int(tensor.shape[0]))))
        return tensor.nbytes

    def _weight(self, node: Node) -> Tensor | None:
        """The matrix that a product multiplies by; None when both sides are activations, or it is no product."""
        if node.kind not in _PRODUCTS:
            return None
        found = (self._source(name) for name in node.inputs)
        return next((tensor for tensor in found if tensor is not None and len(tensor.shape) >= 2), None)

    def _source(self, name: str) -> Tensor | None:
        """The initializer behind a tensor, with the shape and the floating-point type that the tensor has."""
        maker = self.makers.get(name)
        if name in self.graph.weights or maker is None or maker.kind not in _PASS:
            return self.graph.weights.get(name)
        tensor = self._source(maker.inputs[0])
        if tensor is not None and maker.kind == "DequantizeLinear":
            scale = self.graph.weights.get(maker.inputs[1])
            return Tensor(tensor.dtype if scale is None else scale.dtype, tensor.shape)
        if tensor is None or maker.kind != "Transpose":
            return tensor
        return Tensor(tensor.dtype, (*tensor.shape[:-2], *reversed(tensor.shape[-2:])))

    def _products(self, node: Node, weight: Tensor) -> float:
        """Multiplications with a weight. Of a stack of matrices each row meets one."""
        made = self._shape(node.outputs[0])
        if node.kind == "MatMul" and len(weight.shape) > 2 and made is not None:
            return math.prod(made) * _depth(node, weight)
        return _values(node, weight) * self._rows(node)

    def _rows(self, node: Node) -> float:
        """How often a product's weights are used: the tokens of a matrix, the places of a convolution."""
        if "Conv" in node.kind:
            shape = self._shape(node.outputs[0])
            return self.rows if shape is None else math.prod((shape[0], *shape[2:]))
        known = filter(None, (self._shape(name) for name in (node.inputs[0], node.outputs[0])))
        shape = next(known, None)
        if shape is not None:
            return math.prod(shape[:-1])
        return self.sizes.get("rows", self.rows) if self._gathered(node) else self.rows

    def _gathered(self, node: Node) -> bool:
        """Whether only chosen rows reach the product."""
        return any(maker.kind == "GatherND" for maker in self._before(node.inputs[:1]))

    def _crosses(self, node: Node) -> bool:
        """Whether it is cross-attention."""
        return any(
            map(is_cross, [*node.inputs, *(name for maker in self._before(node.inputs) for name in maker.inputs)])
        )

    def _before(self, names: Sequence[str]) -> Iterator[Node]:
        """What makes these tensors, as far as no product and no attention lies in between."""
        todo, seen = list(names), set()
        while todo:
            maker = self.makers.get(todo.pop())
            if maker is None or id(maker) in seen or maker.kind in _PRODUCTS | _ATTENTION:
                continue
            yield maker
            seen.add(id(maker))
            todo += maker.inputs

    def _parts(self, node: Node) -> int:
        """How many products of activations share their pairs: the dialect opset17 multiplies with the cache and with
        the new tokens apart, and joins what comes of it."""
        joints = [user for name in node.outputs for user in self.users.get(name, []) if user.kind in ("Concat", "Add")]
        makers = [self.makers.get(name) for joint in joints for name in joint.inputs]
        return max(1, sum(m is not None and m.kind in _MATRICES and self._weight(m) is None for m in makers))

    def _width(self, node: Node) -> int:
        """Heads times their size: what the next product behind the attention takes; 0 where there is none."""
        todo, seen = [node], set()
        while todo:
            for user in (user for name in todo.pop(0).outputs for user in self.users.get(name, [])):
                weight = self._weight(user)
                if weight is not None:
                    return _depth(user, weight)
                if id(user) not in seen:
                    seen.add(id(user))
                    todo.append(user)
        return 0

    def _shape(self, name: str) -> tuple[float, ...] | None:
        tensor = self.graph.tensors.get(name)
        if tensor is None or not tensor.shape:
            return None
        sizes = [d if isinstance(d, int) else self.sizes.get(d) for d in tensor.shape]
        return None if None in sizes else tuple(size for size in sizes if size is not None)


def _values(node: Node, weight: Tensor) -> int:
    """Values of a weight matrix; those of MatMulNBits are packed."""
    if node.kind == "MatMulNBits":
        return node.numbers["K"] * node.numbers["N"]
    return math.prod(int(d) for d in weight.shape)


def _depth(node: Node, weight: Tensor) -> int:
    """How long the rows are that a product takes."""
    if node.kind == "MatMulNBits":
        return node.numbers["K"]
    if "Conv" in node.kind:
        return math.prod(int(d) for d in weight.shape[1:])
    return int(weight.shape[-1 if node.numbers.get("transB") else -2])


def _arithmetic(node: Node, weight: Tensor | None) -> str:
    """The type of the numbers that are multiplied."""
    if (
        node.kind in _INT8
        or node.kind == _LOOPED
        or (node.kind == "MatMulNBits" and node.numbers.get("accuracy_level") == 4)
    ):
        return "int8"
    return "float16" if weight is not None and weight.dtype in _HALF else "float32"


# ---------------------------------------------------------------- reading; numbers are those of onnx.proto
def _graph(message: bytes) -> Graph:
    nodes, weights, tensors, constants = [], {}, {}, {}
    for number, kind, _, content in fields(message):
        if kind != BYTES:
            continue
        if number == 1:
            nodes.append(_node(message[content]))
        elif number == 5:
            name, tensor, values = _initializer(message[content])
            weights[name] = tensor
            if values is not None:
                constants[name] = values
        elif number in (11, 12, 13):
            name, tensor = _value_info(message[content])
            tensors[name] = tensor
    told = {name: tensor for name, tensor in tensors.items() if name not in weights}
    return Graph(tuple(nodes), weights, told, constants)


def _node(message: bytes) -> Node:
    parts = _parts(message)
    attributes = [_parts(attribute) for attribute in parts.get(5, [])]
    numbers = {a[1][0].decode(): _signed(a[3][0]) for a in attributes if 1 in a and 3 in a}
    texts = [tuple(text.decode() for text in parts.get(number, [])) for number in (1, 2)]
    lists = {a[1][0].decode(): tuple(map(_signed, _numbers(a[8]))) for a in attributes if 1 in a and 8 in a}
    return Node(parts.get(3, [b""])[0].decode(), parts[4][0].decode(), texts[0], texts[1], numbers, lists)


def _signed(number: int) -> int:
    """A varint as an int64."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _initializer(message: bytes) -> tuple[str, Tensor, tuple[int, ...] | None]:
    """Name, type and shape, and the values of a few int64."""
    parts = _parts(message)
    tensor, values = Tensor(parts.get(2, [0])[0], tuple(_numbers(parts.get(1, [])))), None
    if tensor.dtype == _INT64 and tensor.nbytes <= 8 * _FEW and (7 in parts or 9 in parts):
        raw = parts.get(9, [b""])[0]
        values = tuple(memoryview(raw).cast("q")) if raw else tuple(map(_signed, _numbers(parts.get(7, []))))
    return parts[8][0].decode(), tensor, values


def _value_info(message: bytes) -> tuple[str, Tensor]:
    parts = _parts(message)
    kind = _parts(_parts(parts.get(2, [b""])[0]).get(1, [b""])[0])
    dims = [_parts(dim) for dim in _parts(kind.get(2, [b""])[0]).get(1, [])]
    shape = tuple(dim[1][0] if 1 in dim else dim.get(2, [b""])[0].decode() for dim in dims)
    return parts[1][0].decode(), Tensor(kind.get(1, [0])[0], shape)


def _parts(message: bytes) -> dict:
    """All contents by field number: numbers, or bytes."""
    found: dict[int, list] = {}
    for number, kind, _, content in fields(message):
        value = read_varint(message, content.start)[0] if kind == VARINT else message[content]
        found.setdefault(number, []).append(value)
    return found


def _numbers(values: list) -> Iterator[int]:
    """A repeated number, packed into bytes or one field each."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        position = 0
        while position < len(value):
            number, position = read_varint(value, position)
            yield number
