"""The one writer of linear layers: every form a weight can take in a graph.

`linear` picks the form from a Precision and from what the graph may hold. Forms for the `contrib` dialect (ONNX
Runtime's own operators): float MatMul, half-precision weights cast on load, DynamicQuantizeMatMul and
MatMulIntegerToFloat (uint8 activations: signed ones are many times slower there), MatMulNBits (blocks); in half
precision, for CUDA, whose kernels quantize no activations, MatMul and MatMulNBits alone. For the standard dialects:
MatMul in the graph's float type, and MatMul over DequantizeLinear of int8 weights per output channel or int4 weights in
blocks, activations as QuantizeLinear → DequantizeLinear (all symmetric, positive scales, zero points 0, as TensorRT
demands); float8 e4m3 in the place of int8 for fp8. Where each row of activations has a scale of its own, a row is
divided by its largest magnitude first, so that the kernels' one scale serves them all, and the product is multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mllm_edge.graph import rtn, searched
from mllm_edge.graph.precision import Precision, Range, block_size
from mllm_edge.graph.scales import smallest, storable

if TYPE_CHECKING:
    from mllm_edge.graph.builder import GraphBuilder

__all__ = [
    "Linear",
    "Quantized",
    "Rounding",
    "by_weights",
    "keeps_activations",
    "linear",
    "pack_blocks",
    "quantized_input",
    "quantized_rows",
    "to_float",
    "to_half",
]

_MICROSOFT = "com.microsoft"
_FLOAT, _HALF, _UINT8, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8
_INT4, _FP8 = ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
# What uint8 codes around 128 hold when the largest magnitude is 1, in steps of 1/127.
_CODES = (-128 / 127, 1.0)


class Rounding(Protocol):
    """Chooses the codes and scales of a weight [N, K] float32; the module `methods.rtn` is one."""

    def quantize_blocks(
        self, weight: np.ndarray, bits: int, block: int, positive_scales: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes [N, blocks, block] uint8 around 2^(bits−1), scales [N, blocks] float32."""
        ...

    def quantize_channels(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes [N, K] int8, scales [N] float32."""
        ...


@dataclass(frozen=True)
class Quantized:
    """x in 8 bits, for several layers: `values` are uint8 codes in `contrib`, else what codes stand for, over
    `input_range`. `peaks` [..., 1]: what rows were divided by before, and their products are to be multiplied by; None:
    nothing."""

    values: ir.Value
    input_range: Range
    peaks: ir.Value | None = None


@dataclass(frozen=True)
class Linear:
    """y = x · weightᵀ + bias. `weight` and `bias` return float32 arrays [out, in] and [out] when called.

    `quantized`: x as `quantized_input` or `quantized_rows` made it, for precisions that have inputs in 8 bits.
    """

    name: str
    shape: tuple[int, int]
    weight: Callable[[], np.ndarray]
    bias: Callable[[], np.ndarray] | None = None
    rounding: Rounding = rtn
    quantized: Quantized | None = None


def by_weights(precision: Precision) -> Rounding:
    """What rounds a weight that no calibration decided about."""
    return searched if precision.method == "evened" else rtn


def quantized_input(graph: "GraphBuilder", x: ir.Value, name: str, where: Range, fp8: bool = False) -> Quantized:
    """x in 8 bits (int8 or float8) over the range `where`."""
    scale, zero = _activation_scale(graph, name, where, fp8)
    codes = graph.node("QuantizeLinear", [x, scale, zero], f"{name}.codes")
    values = codes if graph.contrib else graph.node("DequantizeLinear", [codes, scale, zero], f"{name}.int8")
    return Quantized(values, where)


def quantized_rows(graph: "GraphBuilder", x: ir.Value, name: str, fp8: bool = False) -> Quantized:
    """x in 8 bits, each row over the range of its own largest magnitude; rows of zeros stay zero."""
    graph.require_opset(18)  # axes as an input
    kind = graph.float_type.numpy()
    axis = graph.constant("peak.axis", np.array([-1], np.int64))
    largest = graph.node("ReduceMax", [graph.node("Abs", [x], f"{name}.absolute"), axis], f"{name}.row_max")
    peaks = graph.node(
        "Max", [largest, graph.constant("peak.least", np.array(smallest(kind), kind))], f"{name}.row_peak"
    )
    relative = graph.node("Div", [x, peaks], f"{name}.relative")
    return replace(quantized_input(graph, relative, name, _CODES if graph.contrib else (-1.0, 1.0), fp8), peaks=peaks)


def keeps_activations(graph: "GraphBuilder") -> bool:
    """Whether activations stay as they are whatever a recipe says: `contrib` in half precision is the form for CUDA,
    which has no kernels of DynamicQuantizeMatMul and MatMulIntegerToFloat. Weights in 8 bits save memory all the same.
    """
    return graph.contrib and graph.float_type != _FLOAT


def linear(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    """Append `layer` applied to x [..., in] in the graph's float type; returns [..., out] in that type."""
    takes_floats = graph.contrib and (precision.in_blocks or keeps_activations(graph))
    if precision.per_token and layer.quantized is None and not takes_floats:
        layer = replace(layer, quantized=quantized_rows(graph, x, layer.name, precision.kind == "fp8"))
    if not graph.contrib or (keeps_activations(graph) and precision.kind in ("float32", "float16")):
        return _standard(graph, x, layer, precision)
    if precision.in_blocks or keeps_activations(graph):
        return _blocks(graph, x, layer, precision)
    if precision.rounds_inputs:
        return _int8_static(graph, layer)
    if precision.kind == "int8_dynamic":
        return _int8_dynamic(graph, x, layer)
    return _float(graph, x, layer, half=precision.kind == "float16")


def pack_blocks(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [N, blocks, block] uint8 to MatMulNBits' B [N, blocks, block·bits/8] uint8, low bits first."""
    if bits == 8:
        return codes
    pairs = codes.view("<u2")
    return (pairs | (pairs >> 4)).astype(np.uint8)


def _float(graph: "GraphBuilder", x: ir.Value, layer: Linear, half: bool) -> ir.Value:
    rows, row = layer.shape
    if half:
        stored = graph.weight(f"{layer.name}.weight", _HALF, (row, rows), lambda: to_half(layer.name, layer.weight().T))
        weight = graph.node("Cast", [stored], f"{layer.name}.weight.float", to=_FLOAT)
    else:
        weight = graph.weight(f"{layer.name}.weight", _FLOAT, (row, rows), lambda: layer.weight().T)
    return _matmul(graph, x, weight, layer)


def _matmul(graph: "GraphBuilder", x: ir.Value, weight: ir.Value, layer: Linear) -> ir.Value:
    """x · weight [in, out] + bias."""
    if layer.quantized is not None and layer.quantized.peaks is not None:
        product = graph.node("MatMul", [x, weight], f"{layer.name}.matmul")
        return _times_peaks(graph, product, layer.quantized.peaks, layer)
    bias = _bias(graph, layer)
    if bias is None:
        return graph.node("MatMul", [x, weight], layer.name)
    return graph.node("Add", [graph.node("MatMul", [x, weight], f"{layer.name}.matmul"), bias], layer.name)


def _standard(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    rows, row = layer.shape
    name, kind = f"{layer.name}.weight", graph.float_type
    if precision.kind == "float16" and kind == _FLOAT:
        return _float(graph, x, layer, half=True)
    if precision.kind in ("float32", "float16"):
        weight = graph.weight(name, kind, (row, rows), lambda: to_float(name, layer.weight().T, kind))
    elif precision.kind == "fp8":
        floats = _Once(lambda: _float8(layer, kind))
        codes = graph.weight(name, _FP8, (row, rows), lambda: floats()[0].T)
        scales = graph.weight(f"{name}.scale", kind, (rows,), lambda: to_float(name, floats()[1], kind))
        weight = graph.node("DequantizeLinear", [codes, scales], f"{name}.float", axis=1)
    elif precision.bits == 8 or row % block_size(row, precision.largest_block):
        # TensorRT has no int8 blocks, nor a last one that is shorter: one scale per output channel.
        channels = _Once(lambda: _channels(layer, kind))
        codes = graph.weight(name, _INT8, (row, rows), lambda: channels()[0].T)
        scales = graph.weight(f"{name}.scale", kind, (rows,), lambda: to_float(name, channels()[1], kind))
        weight = graph.node("DequantizeLinear", [codes, scales], f"{name}.float", axis=1)
    else:
        graph.require_opset(21)  # int4 and blocks in DequantizeLinear
        block = block_size(row, precision.largest_block)
        blocks = -(-row // block)
        packed = _Once(lambda: _blocks_of_4(layer, precision, block, kind, positive_scales=True))
        codes = graph.weight(name, _INT4, (row, rows), lambda: _int4_columns(packed()[0], row))
        scales = graph.weight(f"{name}.scale", kind, (blocks, rows), lambda: to_float(name, packed()[1].T, kind))
        weight = graph.node("DequantizeLinear", [codes, scales], f"{name}.float", axis=0, block_size=block)
    return _matmul(graph, x if layer.quantized is None else layer.quantized.values, weight, layer)


def _times_peaks(graph: "GraphBuilder", product: ir.Value, peaks: ir.Value, layer: Linear) -> ir.Value:
    """The product of rows that were divided by their peaks, as of rows that were not, + bias."""
    bias = _bias(graph, layer)
    if bias is None:
        return graph.node("Mul", [product, peaks], layer.name)
    return graph.node("Add", [graph.node("Mul", [product, peaks], f"{layer.name}.unbiased"), bias], layer.name)


def _float8(layer: Linear, kind: ir.DataType) -> tuple[np.ndarray, np.ndarray]:
    """float8 codes and scales for `kind`."""
    weight = layer.weight()
    return storable(*rtn.quantize_fp8(weight), kind.numpy(), exact=lambda: weight)


def _channels(layer: Linear, kind: ir.DataType) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and scales for `kind`."""
    weight = layer.weight()
    codes, scales = layer.rounding.quantize_channels(weight)
    return storable(codes, scales, kind.numpy(), exact=(lambda: weight) if layer.rounding in (rtn, searched) else None)


def _blocks_of(
    layer: Linear, bits: int, block: int, kind: ir.DataType, positive_scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes around 2^(bits−1) and scales for `kind`."""
    weight = layer.weight()
    codes, scales = layer.rounding.quantize_blocks(weight, bits, block, positive_scales)

    def blocks() -> np.ndarray:
        return np.pad(weight, ((0, 0), (0, codes[0].size - weight.shape[1]))).reshape(codes.shape)

    exact = blocks if layer.rounding in (rtn, searched) else None
    return storable(codes, scales, kind.numpy(), 1 << (bits - 1), exact)


def _blocks_of_4(
    layer: Linear, precision: Precision, block: int, kind: ir.DataType, positive_scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes around 8 and scales for `kind`; fewer bits than 4 lie in the middle of the range."""
    codes, scales = _blocks_of(layer, precision.bits, block, kind, positive_scales)
    return codes if precision.bits == 4 else codes + np.uint8(8 - (1 << (precision.bits - 1))), scales


def _int4_columns(codes: np.ndarray, row: int) -> np.ndarray:
    """Codes [N, blocks, block] uint8 around 8 → int4 [K, N] around 0."""
    flat = codes.reshape(len(codes), -1)[:, :row]
    return (flat.T.astype(np.int8) - 8).astype(ml_dtypes.int4)


def to_float(name: str, array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """float32 → float16, bfloat16 or float32; raises OverflowError as `to_half`."""
    return to_half(name, array) if dtype == _HALF else array.astype(dtype.numpy())


def to_half(name: str, array: np.ndarray) -> np.ndarray:
    """float32 → float16; raises OverflowError naming the tensor where a value exceeds 65504."""
    peak = float(np.abs(array).max(initial=0.0))
    if not peak <= float(np.finfo(np.float16).max):
        raise OverflowError(f"{name}: magnitude {peak:g} exceeds float16's 65504")
    return array.astype(np.float16)


def _bias(graph: "GraphBuilder", layer: Linear) -> ir.Value | None:
    if layer.bias is None:
        return None
    name, bias, kind = f"{layer.name}.bias", layer.bias, graph.float_type
    return graph.weight(name, kind, (layer.shape[0],), lambda: to_float(name, bias(), kind))


def _int8_dynamic(graph: "GraphBuilder", x: ir.Value, layer: Linear) -> ir.Value:
    codes, scales, zero = _int8_weight(graph, layer)
    inputs = [x, codes, scales, zero, _bias(graph, layer)]
    return graph.node("DynamicQuantizeMatMul", inputs, layer.name, _MICROSOFT)


def _int8_static(graph: "GraphBuilder", layer: Linear) -> ir.Value:
    assert layer.quantized is not None
    codes, scales, zero = _int8_weight(graph, layer)
    input_scale, input_zero = _activation_scale(graph, layer.name, layer.quantized.input_range)
    inputs = [layer.quantized.values, codes, input_scale, scales, input_zero, zero]
    if layer.quantized.peaks is None:
        return graph.node("MatMulIntegerToFloat", [*inputs, _bias(graph, layer)], layer.name, _MICROSOFT)
    product = graph.node("MatMulIntegerToFloat", inputs, f"{layer.name}.product", _MICROSOFT)
    return _times_peaks(graph, product, layer.quantized.peaks, layer)


def _int8_weight(graph: "GraphBuilder", layer: Linear) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes [in, out] int8, scales [out] and the zero point 0."""
    rows, row = layer.shape
    quantized = _Once(lambda: _channels(layer, _FLOAT))
    codes = graph.weight(f"{layer.name}.weight", _INT8, (row, rows), lambda: quantized()[0].T)
    scales = graph.weight(f"{layer.name}.scale", _FLOAT, (rows,), lambda: quantized()[1])
    return codes, scales, graph.constant("zero.int8", np.array(0, np.int8))


def _activation_scale(graph: "GraphBuilder", name: str, where: Range, fp8: bool = False) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of activations: the whole range in `contrib`, else symmetric."""
    low, high = where
    kind = graph.float_type.numpy()
    if graph.contrib:
        scale = max((high - low) / 255, smallest(kind))
        zero = np.array(round(-low / scale), np.uint8)
    elif fp8:
        scale, zero = max(-low, high) / rtn.FP8_MAX, np.array(0, ml_dtypes.float8_e4m3fn)
    else:
        scale, zero = max(-low, high) / 127, np.array(0, np.int8)
    return (
        graph.constant(f"{name}.input.scale", np.array(max(scale, smallest(kind)), kind)),
        graph.constant(f"{name}.input.zero", zero),
    )


def _blocks(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    rows, row = layer.shape
    bits, block = max(precision.bits, 4), block_size(row, precision.largest_block)
    blocks, kind = -(-row // block), graph.float_type
    if bits == 4:
        quantized = _Once(lambda: _blocks_of_4(layer, precision, block, kind))
    else:
        quantized = _Once(lambda: _blocks_of(layer, bits, block, kind))
    packed = graph.weight(
        f"{layer.name}.weight", _UINT8, (rows, blocks, block * bits // 8), lambda: pack_blocks(quantized()[0], bits)
    )
    name, bias = layer.name, _bias(graph, layer)
    scales = graph.weight(
        f"{name}.scale", kind, (rows, blocks), lambda: to_float(f"{name}.scale", quantized()[1], kind)
    )
    shape = {"K": row, "N": rows, "bits": bits, "block_size": block}
    if not keeps_activations(graph):
        inputs = [x, packed, scales, None, None, bias]
        # accuracy_level 4 quantizes activations to int8 per block: the only level with fast CPU kernels.
        return graph.node("MatMulNBits", inputs, name, _MICROSOFT, **shape, accuracy_level=4)
    if bias is None:
        return graph.node("MatMulNBits", [x, packed, scales], name, _MICROSOFT, **shape)
    # CUDA's kernel adds no bias.
    product = graph.node("MatMulNBits", [x, packed, scales], f"{name}.matmul", _MICROSOFT, **shape)
    return graph.node("Add", [product, bias], name)


class _Once:
    """Calls `compute` on first use and keeps the result: codes and scales come from one pass over a weight."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, np.ndarray]]):
        self._compute, self._result = compute, None  # type: tuple[Callable, tuple[np.ndarray, np.ndarray] | None]

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._result is None:
            self._result = self._compute()
        return self._result
