"""Round to nearest: no data, one pass over the weight."""

import ml_dtypes
import numpy as np

from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.scales import reciprocal

__all__ = ["FP8_MAX", "quantize_blocks", "quantize_channels", "quantize_fp8", "rounded_blocks"]

FP8_MAX = 448.0  # of float8 e4m3


def quantize_blocks(
    weight: np.ndarray, bits: int, block: int, positive_scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric block quantization of a weight [N, K] float32 along K.

    Returns codes [N, blocks, block] uint8 around the zero point 2^(bits−1), and scales [N, blocks] float32 with
    weight ≈ (code − zero point) · scale. K is padded with zeros to whole blocks.

    The element of largest magnitude maps exactly onto −2^(bits−1), the end of the range that has one code more, so
    the scale carries its sign (the convention of ONNX Runtime's and llama.cpp's symmetric 4-bit formats).
    With `positive_scales` (TensorRT) it maps onto ±(2^(bits−1) − 1).
    """
    rows, row = weight.shape
    blocks = -(-row // block)
    codes, scales = np.empty((rows, blocks, block), np.uint8), np.empty((rows, blocks), np.float32)

    def work(start: int, stop: int) -> None:
        part = weight[start:stop]
        if blocks * block != row:
            part = np.pad(part, ((0, 0), (0, blocks * block - row)))
        grouped = part.reshape(len(part), blocks, block)
        _round_blocks(grouped, 1 << (bits - 1), positive_scales, codes[start:stop], scales[start:stop])

    for_each_chunk(rows, row, work)
    return codes, scales


def _round_blocks(grouped: np.ndarray, zero: int, positive_scales: bool, codes: np.ndarray, scales: np.ndarray) -> None:
    """Fill `codes` and `scales` for the blocks [n, blocks, block]."""
    work = np.abs(grouped)
    peak = np.take_along_axis(grouped, work.argmax(-1)[..., None], -1)[..., 0]
    np.divide(np.abs(peak) if positive_scales else peak, zero - 1 if positive_scales else -zero, out=scales)
    inverse = reciprocal(scales)
    np.multiply(grouped, inverse[..., None], out=work)
    np.rint(work, out=work)
    work += zero
    np.clip(work, 0, 2 * zero - 1, out=work)
    np.copyto(codes, work, casting="unsafe")


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit quantization of a weight [N, K] float32 with one scale per output channel.

    Returns codes [N, K] int8 in [−127, 127] and scales [N] float32 with weight ≈ code · scale.
    """
    rows, row = weight.shape
    codes, scales = np.empty((rows, row), np.int8), np.empty(rows, np.float32)

    def work(start: int, stop: int) -> None:
        part, scale = weight[start:stop], scales[start:stop]
        values = np.abs(part)
        np.divide(values.max(axis=1), 127.0, out=scale)
        inverse = reciprocal(scale)
        np.multiply(part, inverse[:, None], out=values)
        np.copyto(codes[start:stop], np.rint(values, out=values), casting="unsafe")

    for_each_chunk(rows, row, work)
    return codes, scales


def quantize_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight [N, K] float32 as float8 (e4m3) with one scale per output channel: codes [N, K], scales [N] float32."""
    scales = (np.abs(weight).max(axis=1) / FP8_MAX).astype(np.float32)
    inverse = reciprocal(scales)
    return (weight * inverse[:, None]).astype(ml_dtypes.float8_e4m3fn), scales


def rounded_blocks(part: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Weights [N, k] after rounding to `bits` with positive scales [N]: what the graph will compute with."""
    high = (1 << (bits - 1)) - 1
    inverse = reciprocal(scales)
    rounded = part * inverse[:, None]
    np.clip(np.rint(rounded, out=rounded), -high - 1, high, out=rounded)
    rounded *= scales[:, None]
    return rounded
