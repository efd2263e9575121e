"""Round to nearest: no data, one pass over the weight."""

import numpy as np

__all__ = ["quantize_blocks", "quantize_channels"]


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
    if blocks * block != row:
        weight = np.pad(weight, ((0, 0), (0, blocks * block - row)))
    grouped = weight.reshape(rows, blocks, block)
    zero = 1 << (bits - 1)
    peak = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
    scales = (np.abs(peak) / (zero - 1) if positive_scales else peak / -zero).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(grouped * inverse)
    codes += zero
    np.clip(codes, 0, 2 * zero - 1, out=codes)
    return codes.astype(np.uint8), scales[..., 0]


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit quantization of a weight [N, K] float32 with one scale per output channel.

    Returns codes [N, K] int8 in [−127, 127] and scales [N] float32 with weight ≈ code · scale.
    """
    scales = (np.abs(weight).max(axis=1) / 127.0).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(weight * inverse[:, None])
    return codes.astype(np.int8), scales
