"""Round to nearest: no data, one pass over the weight."""

import ml_dtypes
import numpy as np

from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.scales import reciprocal

__all__ = [
    "FP8_MAX",
    "in_blocks",
    "peak_scales",
    "quantize_blocks",
    "quantize_channels",
    "quantize_fp8",
    "rounded_blocks",
]

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
    zero = 1 << (bits - 1)

    def work(start: int, stop: int) -> None:
        grouped = in_blocks(weight[start:stop], block)
        magnitudes = np.abs(grouped)
        scales[start:stop] = peak_scales(grouped, magnitudes, zero, positive_scales)
        _round_blocks(grouped, scales[start:stop], zero, codes[start:stop], magnitudes)

    for_each_chunk(rows, row, work)
    return codes, scales


def in_blocks(part: np.ndarray, block: int) -> np.ndarray:
    """Rows [n, K] as [n, blocks, block], with zeros behind where the last block is not full."""
    missing = -part.shape[1] % block
    return (np.pad(part, ((0, 0), (0, missing))) if missing else part).reshape(len(part), -1, block)


def peak_scales(grouped: np.ndarray, magnitudes: np.ndarray, zero: int, positive_scales: bool) -> np.ndarray:
    """Scales [n, blocks] of `quantize_blocks` for the blocks [n, blocks, block] with these `magnitudes`."""
    if positive_scales:
        return magnitudes.max(-1) / np.float32(zero - 1)
    return np.take_along_axis(grouped, magnitudes.argmax(-1)[..., None], -1)[..., 0] / np.float32(-zero)


def _round_blocks(grouped: np.ndarray, scales: np.ndarray, zero: int, codes: np.ndarray, work: np.ndarray) -> None:
    """Fill `codes` for the blocks [n, blocks, block]; `work` has their shape."""
    np.multiply(grouped, reciprocal(scales)[..., None], out=work)
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
