"""Attention of vision encoders in 8-bit products, from ONNX Runtime's own operators.

softmax(q·kᵀ·scale)·v, one head and some hundred rows at a time: scores stay in the processor's cache, and ten thousand
patches take little more memory than a thousand.

- q, k and v are quantized as they come (DynamicQuantizeLinear), with one scale each. ONNX Runtime multiplies uint8 by
  int8: the other way round is ten times slower, uint8 by uint8 twice.
- Softmax is float32. Each row of it is quantized by its own largest weight, which becomes 127: with one scale for all,
  1/255, weights below 1/510 would be lost, and of thousands of patches that see each other evenly that is all of them.
  (Not 255: processors without VNNI add two products in 16 bits, which 127 · 128 · 2 just fits.)
- The zero point of each column of v is its mean over the patches. Weights sum to 1, so the mean is added behind the
  product, and stands for what many small weights lose beside one that is large. (SageAttention, arXiv 2410.02367,
  takes the mean out of k to the same end.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mllm_edge.graph import operators
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder
from mllm_edge.graph.datafile import DataSink

__all__ = ["LEAST_KEYS", "OPSET", "int8_attention", "quantize_attention"]

LEAST_KEYS = 256  # fewer are attended to as fast in float32
OPSET = 18  # BitwiseXor, and Pad along a named axis
_MOST_SCORES = 1 << 20  # at a time: 4 MB of float32
_LARGEST = 127  # code of a row's largest weight
_Number = int | ir.Value  # known, or [1] int64
_UINT8, _INT8, _FLOAT = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.FLOAT


def quantize_attention(graph: ir.Graph, data: DataSink) -> int:
    """Write each MultiHeadAttention of `graph`, changed in place, as `int8_attention`, but those with a bias and those
    that are known to have few keys. Returns how many there were; the graph's opset must be `OPSET` then."""
    chosen = [node for node in graph if node.op_type == "MultiHeadAttention" and _pays(node)]
    for node in chosen:
        builder = GraphBuilder(graph.name or "", OPSET, data, contrib=True)
        query, key, value = (x for x in node.inputs[:3] if x is not None)
        heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
        name = node.outputs[0].name or "attention"
        builder.splice(graph, node, int8_attention(builder, name, heads, scale, query, key, value))
    return len(chosen)


def int8_attention(
    graph: GraphBuilder, name: str, heads: int, scale: float, query: ir.Value, key: ir.Value, value: ir.Value
) -> ir.Value:
    """Attention of `query` [N, S, D] over `key` and `value` [N, L, D], float32, without a bias → [N, S, D]."""
    q = _unsigned(graph, f"{name}.q", query)
    k = _signed(graph, f"{name}.k", _unsigned(graph, f"{name}.k", key))
    v = _signed(graph, f"{name}.v", _unsigned(graph, f"{name}.v", value))
    keys = _length(graph, f"{name}.keys", key)
    rows = _Rows.of(graph, name, _length(graph, f"{name}.rows", query), keys)
    q_heads = _heads(graph, f"{name}.q", rows.padded(graph, name, q.codes), heads, (0, 2, 1, 3))
    k_heads = _heads(graph, f"{name}.k", k.codes, heads, (0, 2, 3, 1))
    v_heads = _heads(graph, f"{name}.v", v.codes, heads, (0, 2, 1, 3))
    size = _size(query) // heads
    stacked = [
        _reshaped(graph, f"{name}.q.blocks", q_heads, [-1, rows.blocks, rows.block, size]),
        _reshaped(graph, f"{name}.k.stacked", k_heads, [-1, size, keys]),
        _reshaped(graph, f"{name}.v.stacked", v_heads, [-1, keys, size]),
    ]
    centres = _centres(graph, name, stacked[2], keys, v)
    factor = graph.constant(f"attention.scale.{scale:.9g}", np.array(scale, np.float32))
    q_scale = graph.node("Mul", [q.scale, factor], f"{name}.scale")
    body = _head(graph, name, _Codes(q.codes, q_scale, q.zero), k, v)
    attended = graph.node("Scan", [*stacked, *centres], f"{name}.heads", num_scan_inputs=5, body=body)
    attended = _reshaped(graph, f"{name}.apart", attended, [-1, heads, rows.all, size])
    attended = graph.node("Transpose", [attended], f"{name}.apart.rows", perm=[0, 2, 1, 3])
    return rows.unpadded(graph, name, _reshaped(graph, f"{name}.merged", attended, [0, 0, heads * size]))


def _pays(node: ir.Node) -> bool:
    """Whether this MultiHeadAttention has a form in 8 bits that is faster, as far as the file tells."""
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None or any(x is not None for x in node.inputs[3:]):
        return False
    shapes = [x.shape for x in (query, key, value) if x.shape is not None and isinstance(x.shape[-1], int)]
    return len(shapes) == 3 and all(not isinstance(s[1], int) or s[1] >= LEAST_KEYS for s in shapes)


def _size(x: ir.Value) -> int:
    """D of [N, S, D]."""
    assert x.shape is not None
    size = x.shape[-1]
    assert isinstance(size, int)
    return size


def _length(graph: GraphBuilder, name: str, x: ir.Value) -> _Number:
    """S of [N, S, D]."""
    assert x.shape is not None
    return x.shape[1] if isinstance(x.shape[1], int) else graph.node("Shape", [x], name, start=1, end=2)


@dataclass(frozen=True)
class _Codes:
    """Codes, and what they stand for: scale · (codes − zero), both of one value."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value


def _unsigned(graph: GraphBuilder, name: str, x: ir.Value) -> _Codes:
    """x in uint8."""
    return _Codes(*graph.nodes("DynamicQuantizeLinear", [x], f"{name}.codes", outputs=3))


def _signed(graph: GraphBuilder, name: str, x: _Codes) -> _Codes:
    """uint8 codes less 128: the same numbers in int8. (Flipping the highest bit does that, and the cast keeps bits.)"""

    def less(part: str, value: ir.Value) -> ir.Value:
        flipped = graph.node("BitwiseXor", [value, graph.constant("attention.128", np.uint8(128))], f"{name}.{part}")
        return graph.node("Cast", [flipped], f"{name}.{part}.int8", to=_INT8)

    return _Codes(less("flipped", x.codes), x.scale, less("zero", x.zero))


@dataclass(frozen=True)
class _Rows:
    """The query's rows in `blocks` of `block` rows each; `all` is their product, `given` how many there are."""

    given: _Number
    blocks: _Number
    block: _Number
    all: _Number

    @staticmethod
    def of(graph: GraphBuilder, name: str, given: _Number, keys: _Number) -> "_Rows":
        if isinstance(given, int) and isinstance(keys, int):
            blocks = -(-given * keys // _MOST_SCORES)
            block = -(-given // blocks)
            return _Rows(given, blocks, block, blocks * block)
        scores = graph.node("Mul", [_value(graph, given), _value(graph, keys)], f"{name}.rows.scores")
        count = _up(graph, f"{name}.rows.blocks", scores, _value(graph, _MOST_SCORES))
        size = _up(graph, f"{name}.rows.block", _value(graph, given), count)
        return _Rows(given, count, size, graph.node("Mul", [count, size], f"{name}.rows.all"))

    def padded(self, graph: GraphBuilder, name: str, codes: ir.Value) -> ir.Value:
        """[N, S, D] with rows added that fill the last block."""
        if self.all == self.given:
            return codes
        missing = graph.node("Sub", [_value(graph, self.all), _value(graph, self.given)], f"{name}.rows.missing")
        pads = graph.node("Concat", [_value(graph, 0), missing], f"{name}.rows.pads", axis=0)
        return graph.node("Pad", [codes, pads, None, _value(graph, 1)], f"{name}.rows.padded")

    def unpadded(self, graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
        """[N, all, D] without what was added."""
        if self.all == self.given:
            return x
        return graph.node("Slice", [x, *(_value(graph, n) for n in (0, self.given, 1))], f"{name}.rows.unpadded")


def _up(graph: GraphBuilder, name: str, x: ir.Value, by: ir.Value) -> ir.Value:
    """x / by, rounded up."""
    more = graph.node("Sub", [graph.node("Add", [x, by], f"{name}.sum"), _value(graph, 1)], f"{name}.more")
    return graph.node("Div", [more, by], name)


def _value(graph: GraphBuilder, n: _Number) -> ir.Value:
    """[1] int64."""
    return n if isinstance(n, ir.Value) else graph.constant(f"attention.number.{n}", np.array([n], np.int64))


def _reshaped(graph: GraphBuilder, name: str, x: ir.Value, shape: Sequence[_Number]) -> ir.Value:
    known = [n for n in shape if isinstance(n, int)]
    if len(known) == len(shape):
        return operators.reshape(graph, name, x, known)
    target = graph.node("Concat", [_value(graph, n) for n in shape], f"{name}.shape", axis=0)
    return graph.node("Reshape", [x, target], name)


def _heads(graph: GraphBuilder, name: str, codes: ir.Value, heads: int, order: tuple[int, ...]) -> ir.Value:
    """[N, L, D] → [N, L, heads, D/heads], its axes in another order."""
    apart = operators.reshape(graph, f"{name}.apart", codes, (0, 0, heads, -1))
    return graph.node("Transpose", [apart], f"{name}.heads", perm=order)


def _centres(graph: GraphBuilder, name: str, stacked: ir.Value, keys: _Number, v: _Codes) -> list[ir.Value]:
    """The mean of each column of v's codes [M, L, size], rounded: as codes [M, size], and as what they stand for."""
    row = _value(graph, keys)
    one = graph.constant("attention.one", np.array([[1]], np.uint8))
    shape = graph.node("Concat", [_value(graph, 1), row], f"{name}.ones.shape", axis=0)
    sums = graph.node("MatMulInteger", [graph.node("Expand", [one, shape], f"{name}.ones"), stacked], f"{name}.v.sums")
    length = graph.node("Cast", [row], f"{name}.v.length", to=_FLOAT)
    mean = graph.node("Div", [graph.node("Cast", [sums], f"{name}.v.sums.float", to=_FLOAT), length], f"{name}.v.mean")
    level = graph.node("Squeeze", [mean, _value(graph, 1)], f"{name}.v.level")
    rounded = graph.node("Round", [level], f"{name}.v.centre")
    zero = graph.node("Cast", [v.zero], f"{name}.v.zero.float", to=_FLOAT)
    value = graph.node("Mul", [graph.node("Sub", [rounded, zero], f"{name}.v.above"), v.scale], f"{name}.v.offset")
    return [graph.node("Cast", [rounded], f"{name}.v.centre.int8", to=_INT8), value]


def _head(graph: GraphBuilder, name: str, q: _Codes, k: _Codes, v: _Codes) -> ir.Graph:
    """One head of one image: blocks of query rows, keys, values, their centres and offsets → what the rows get."""
    head = graph.inner(f"{name}.head")
    blocks = head.input(f"{name}.head.q", _UINT8, (None, None, None))
    keys = head.input(f"{name}.head.k", _INT8, (None, None))
    values = head.input(f"{name}.head.v", _INT8, (None, None))
    centre = head.input(f"{name}.head.centre", _INT8, (None,))
    offset = head.input(f"{name}.head.offset", _FLOAT, (None,))
    inner = head.inner(f"{name}.block")
    rows = inner.input(f"{name}.block.q", _UINT8, (None, None))
    scores = inner.node(
        "MatMulIntegerToFloat", [rows, keys, q.scale, k.scale, q.zero, k.zero], f"{name}.scores", MICROSOFT
    )
    weights = inner.node("Softmax", [scores], f"{name}.weights", axis=-1)
    last = _value(graph, -1)
    largest = inner.node("ReduceMax", [weights, last], f"{name}.largest", keepdims=1)
    step = graph.constant("attention.step", np.array(1 / _LARGEST, np.float32))
    steps = inner.node("Reshape", [inner.node("Mul", [largest, step], f"{name}.step"), last], f"{name}.steps")
    codes = inner.node("QuantizeLinear", [weights, steps], f"{name}.codes", axis=0)
    product = inner.node("MatMulIntegerToFloat", [codes, values, step, v.scale, None, centre], f"{name}.sum", MICROSOFT)
    scaled = inner.node("Mul", [product, largest], f"{name}.scaled")
    inner.output(inner.node("Add", [scaled, offset], f"{name}.block.y"), f"{name}.block.y", _FLOAT, (None, None))
    attended = head.node("Scan", [blocks], f"{name}.head.y", num_scan_inputs=1, body=inner.graph())
    head.output(attended, f"{name}.head.y", _FLOAT, (None, None, None))
    return head.graph()
