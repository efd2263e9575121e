"""Attention of vision encoders in 8-bit products, from ONNX Runtime's own operators.

softmax(q·kᵀ·scale)·v, one head and some hundred rows at a time: scores stay in the processor's cache, and ten thousand
patches take little more memory than a thousand.

- q, k and v are quantized as they come (DynamicQuantizeLinear), with one scale each. ONNX Runtime multiplies uint8 by
  int8: the other way round is ten times slower, uint8 by uint8 twice.
- Softmax is float32. Each row of it is quantized by its own largest weight, which becomes 255: with the one scale 1/255,
  weights below 1/510 would be lost, and of thousands of patches that see each other evenly that is all of them.
- The zero point of each column of v is its mean over the patches. Weights sum to 1, so the mean is added behind the
  product, and stands for what many small weights lose beside one that is large. (SageAttention, arXiv 2410.02367,
  takes the mean out of k to the same end.)
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mllm_edge.graph.builder import MICROSOFT, GraphBuilder
from mllm_edge.graph.datafile import DataSink

__all__ = ["LEAST_KEYS", "OPSET", "int8_attention", "quantize_attention"]

LEAST_KEYS = 256  # fewer are attended to as fast in float32
OPSET = 18  # BitwiseXor, and Pad along a named axis
_MOST_SCORES = 1 << 20  # at a time: 4 MB of float32
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
    rows = _Rows.of(graph, name, query, key)
    q_heads = _heads(graph, f"{name}.q", rows.padded(graph, name, q.codes), heads, (0, 2, 1, 3))
    k_heads = _heads(graph, f"{name}.k", k.codes, heads, (0, 2, 3, 1))
    v_heads = _heads(graph, f"{name}.v", v.codes, heads, (0, 2, 1, 3))
    size = graph.node("Shape", [q_heads], f"{name}.size", start=3)
    blocks = _joined(graph, f"{name}.blocks", [_number(graph, -1), rows.blocks, rows.block, size])
    stacked = [
        graph.node("Reshape", [q_heads, blocks], f"{name}.q.blocks"),  # [N·heads, blocks, rows, size]
        _stacked(graph, f"{name}.k", k_heads),  # [N·heads, size, L]
        _stacked(graph, f"{name}.v", v_heads),  # [N·heads, L, size]
    ]
    centres = _centres(graph, name, stacked[2], v)
    factor = graph.constant(f"attention.scale.{scale:.9g}", np.array(scale, np.float32))
    q_scale = graph.node("Mul", [q.scale, factor], f"{name}.scale")
    body = _head(graph, name, _Codes(q.codes, q_scale, q.zero), k, v)
    attended = graph.node("Scan", [*stacked, *centres], f"{name}.heads", num_scan_inputs=5, body=body)
    apart = _joined(graph, f"{name}.apart", [_number(graph, -1), _number(graph, heads), rows.all, size])
    attended = graph.node("Reshape", [attended, apart], f"{name}.apart.heads")
    attended = graph.node("Transpose", [attended], f"{name}.apart.rows", perm=[0, 2, 1, 3])
    merged = graph.constant("attention.merged", np.array([0, 0, -1], np.int64))
    return rows.unpadded(graph, name, graph.node("Reshape", [attended, merged], f"{name}.merged"))


def _pays(node: ir.Node) -> bool:
    """Whether this MultiHeadAttention has a form in 8 bits that is faster, as far as the file tells."""
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None or any(x is not None for x in node.inputs[3:]):
        return False
    sizes = [x.shape[1] for x in (query, key) if x.shape is not None and len(x.shape) == 3]
    return not any(isinstance(size, int) and size < LEAST_KEYS for size in sizes)


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
    """The query's rows in `blocks` of `block` rows each, [1] int64; `all` is their product, `given` how many there are.
    `exact`: nothing is left over, as far as the file tells."""

    given: ir.Value
    blocks: ir.Value
    block: ir.Value
    all: ir.Value
    exact: bool

    @staticmethod
    def of(graph: GraphBuilder, name: str, query: ir.Value, key: ir.Value) -> "_Rows":
        known = [None if x.shape is None else x.shape[1] for x in (query, key)]
        if isinstance(known[0], int) and isinstance(known[1], int):
            blocks = -(-known[0] * known[1] // _MOST_SCORES)
            block = -(-known[0] // blocks)
            given, count, size, total = (_number(graph, n) for n in (known[0], blocks, block, blocks * block))
            return _Rows(given, count, size, total, exact=blocks * block == known[0])
        given = graph.node("Shape", [query], f"{name}.rows", start=1, end=2)
        keys = graph.node("Shape", [key], f"{name}.keys", start=1, end=2)
        scores = graph.node("Mul", [given, keys], f"{name}.rows.scores")
        count = _up(graph, f"{name}.rows.blocks", scores, _number(graph, _MOST_SCORES))
        size = _up(graph, f"{name}.rows.block", given, count)
        return _Rows(given, count, size, graph.node("Mul", [count, size], f"{name}.rows.all"), exact=False)

    def padded(self, graph: GraphBuilder, name: str, codes: ir.Value) -> ir.Value:
        """[N, S, D] with rows added that fill the last block."""
        if self.exact:
            return codes
        missing = graph.node("Sub", [self.all, self.given], f"{name}.rows.missing")
        pads = _joined(graph, f"{name}.rows.pads", [_number(graph, 0), missing])
        return graph.node("Pad", [codes, pads, None, _number(graph, 1)], f"{name}.rows.padded")

    def unpadded(self, graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
        """[N, all, D] without what was added."""
        if self.exact:
            return x
        return graph.node("Slice", [x, _number(graph, 0), self.given, _number(graph, 1)], f"{name}.rows.unpadded")


def _up(graph: GraphBuilder, name: str, x: ir.Value, by: ir.Value) -> ir.Value:
    """x / by, rounded up."""
    more = graph.node("Sub", [graph.node("Add", [x, by], f"{name}.sum"), _number(graph, 1)], f"{name}.more")
    return graph.node("Div", [more, by], name)


def _heads(graph: GraphBuilder, name: str, codes: ir.Value, heads: int, order: tuple[int, ...]) -> ir.Value:
    """[N, L, D] → [N, L, heads, D/heads], its axes in another order."""
    shape = graph.constant(f"attention.heads.{heads}", np.array([0, 0, heads, -1], np.int64))
    return graph.node("Transpose", [graph.node("Reshape", [codes, shape], f"{name}.apart")], f"{name}.heads", perm=order)


def _stacked(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """[N, heads, A, B] → [N·heads, A, B]."""
    shape = _joined(graph, f"{name}.shape", [_number(graph, -1), graph.node("Shape", [x], f"{name}.matrix", start=2)])
    return graph.node("Reshape", [x, shape], f"{name}.stacked")


def _centres(graph: GraphBuilder, name: str, stacked: ir.Value, v: _Codes) -> list[ir.Value]:
    """The mean of each column of v's codes [M, L, size], rounded: as codes [M, size], and as what they stand for."""
    shape = graph.node("Shape", [stacked], f"{name}.v.length", start=1, end=2)
    row = _joined(graph, f"{name}.ones.shape", [_number(graph, 1), shape])
    ones = graph.node("Expand", [graph.constant("attention.one", np.uint8(1)), row], f"{name}.ones")
    sums = graph.node("MatMulInteger", [ones, stacked], f"{name}.v.sums")
    length = graph.node("Cast", [shape], f"{name}.v.length.float", to=_FLOAT)
    mean = graph.node("Div", [graph.node("Cast", [sums], f"{name}.v.sums.float", to=_FLOAT), length], f"{name}.v.mean")
    level = graph.node("Squeeze", [mean, _number(graph, 1)], f"{name}.v.level")
    rounded = graph.node("Round", [level], f"{name}.v.centre")
    zero = graph.node("Cast", [v.zero], f"{name}.v.zero.float", to=_FLOAT)
    value = graph.node("Mul", [graph.node("Sub", [rounded, zero], f"{name}.v.above"), v.scale], f"{name}.v.offset")
    return [graph.node("Cast", [rounded], f"{name}.v.centre.int8", to=_INT8), value]


def _head(graph: GraphBuilder, name: str, q: _Codes, k: _Codes, v: _Codes) -> ir.Graph:
    """One head of one image: blocks of query rows, keys, values, their centres and offsets → what the rows attend to."""
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
    last = _number(graph, -1)
    largest = inner.node("ReduceMax", [weights, last], f"{name}.largest", keepdims=1)
    step = graph.constant("attention.step", np.array(1 / 255, np.float32))
    steps = inner.node("Reshape", [inner.node("Mul", [largest, step], f"{name}.step"), last], f"{name}.steps")
    codes = inner.node("QuantizeLinear", [weights, steps], f"{name}.codes", axis=0)
    product = inner.node("MatMulIntegerToFloat", [codes, values, step, v.scale, None, centre], f"{name}.sum", MICROSOFT)
    scaled = inner.node("Mul", [product, largest], f"{name}.scaled")
    inner.output(inner.node("Add", [scaled, offset], f"{name}.block.y"), f"{name}.block.y", _FLOAT, (None, None))
    attended = head.node("Scan", [blocks], f"{name}.head.y", num_scan_inputs=1, body=inner.graph())
    head.output(attended, f"{name}.head.y", _FLOAT, (None, None, None))
    return head.graph()


def _joined(graph: GraphBuilder, name: str, numbers: list[ir.Value]) -> ir.Value:
    return graph.node("Concat", numbers, name, axis=0)


def _number(graph: GraphBuilder, n: int) -> ir.Value:
    """[1] int64."""
    return graph.constant(f"attention.number.{n}", np.array([n], np.int64))
