"""The one writer of linear layers: every form a weight can take in a graph.

`linear` picks the form from a Precision. Forms for the `contrib` dialect (ONNX Runtime's own operators): float MatMul,
half-precision weights cast on load, DynamicQuantizeMatMul (uint8 activations), MatMulNBits (blocks).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.methods import rtn
from mllm_edge.calibration.recipes import Precision, block_size

if TYPE_CHECKING:
    from mllm_edge.export.graph import GraphBuilder

__all__ = ["Linear", "linear", "pack_blocks"]

_MICROSOFT = "com.microsoft"
# How codes and scales are chosen. Rounding needs the weight alone; a calibrated method is one more module here.
_METHODS = {"rtn": rtn}
_FLOAT, _HALF, _UINT8, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8


@dataclass(frozen=True)
class Linear:
    """y = x · weightᵀ + bias. `weight` and `bias` return float32 arrays [out, in] and [out] when called."""

    name: str
    shape: tuple[int, int]
    weight: Callable[[], np.ndarray]
    bias: Callable[[], np.ndarray] | None = None


def linear(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    """Append `layer` applied to x [..., in] float32; returns [..., out] float32."""
    if precision.kind == "blocks":
        return _blocks(graph, x, layer, precision)
    if precision.kind == "int8_dynamic":
        return _int8_dynamic(graph, x, layer, precision)
    return _float(graph, x, layer, half=precision.kind == "float16")


def pack_blocks(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [N, blocks, block] uint8 to MatMulNBits' B [N, blocks, block·bits/8] uint8, low bits first."""
    if bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _float(graph: "GraphBuilder", x: ir.Value, layer: Linear, half: bool) -> ir.Value:
    rows, row = layer.shape
    if half:
        stored = graph.weight(f"{layer.name}.weight", _HALF, (row, rows), lambda: to_half(layer.name, layer.weight().T))
        weight = graph.node("Cast", [stored], f"{layer.name}.weight.float", to=_FLOAT)
    else:
        weight = graph.weight(f"{layer.name}.weight", _FLOAT, (row, rows), lambda: layer.weight().T)
    y = graph.node("MatMul", [x, weight], f"{layer.name}.matmul")
    bias = _bias(graph, layer)
    return y if bias is None else graph.node("Add", [y, bias], layer.name)


def to_half(name: str, array: np.ndarray) -> np.ndarray:
    """float32 → float16; raises OverflowError naming the tensor where a value exceeds 65504."""
    peak = float(np.abs(array).max(initial=0.0))
    if not peak <= float(np.finfo(np.float16).max):
        raise OverflowError(f"{name}: magnitude {peak:g} exceeds float16's 65504")
    return array.astype(np.float16)


def _bias(graph: "GraphBuilder", layer: Linear) -> ir.Value | None:
    if layer.bias is None:
        return None
    return graph.weight(f"{layer.name}.bias", _FLOAT, (layer.shape[0],), layer.bias)


def _int8_dynamic(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    rows, row = layer.shape
    quantized = _Once(lambda: _METHODS[precision.method].quantize_channels(layer.weight()))
    codes = graph.weight(f"{layer.name}.weight", _INT8, (row, rows), lambda: quantized()[0].T)
    scales = graph.weight(f"{layer.name}.scale", _FLOAT, (rows,), lambda: quantized()[1])
    zero = graph.constant("zero.int8", np.array(0, np.int8))
    inputs = [x, codes, scales, zero, _bias(graph, layer)]
    return graph.node("DynamicQuantizeMatMul", inputs, layer.name, _MICROSOFT)


def _blocks(graph: "GraphBuilder", x: ir.Value, layer: Linear, precision: Precision) -> ir.Value:
    rows, row = layer.shape
    bits, block = precision.bits, block_size(row, precision.largest_block)
    blocks = -(-row // block)
    quantized = _Once(lambda: _METHODS[precision.method].quantize_blocks(layer.weight(), bits, block))
    packed = graph.weight(
        f"{layer.name}.weight", _UINT8, (rows, blocks, block * bits // 8), lambda: pack_blocks(quantized()[0], bits)
    )
    scales = graph.weight(f"{layer.name}.scale", _FLOAT, (rows, blocks), lambda: quantized()[1])
    inputs = [x, packed, scales, None, None, _bias(graph, layer)]
    # accuracy_level 4 quantizes activations to int8 per block: the only level with fast CPU kernels.
    return graph.node(
        "MatMulNBits", inputs, layer.name, _MICROSOFT, K=row, N=rows, bits=bits, block_size=block, accuracy_level=4
    )


class _Once:
    """Calls `compute` on first use and keeps the result: codes and scales come from one pass over a weight."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, np.ndarray]]):
        self._compute, self._result = compute, None  # type: tuple[Callable, tuple[np.ndarray, np.ndarray] | None]

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._result is None:
            self._result = self._compute()
        return self._result
