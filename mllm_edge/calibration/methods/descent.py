"""Coordinate descent: codes and scales that another method found are changed one by one, each to what is best beside
all others as they are, so that the error of the outputs can only fall.

The codes' part is Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, section 3;
scales are coordinates like any other.
"""

import numpy as np

from mllm_edge.calibration.methods.forward import decide_rows
from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.scales import reciprocal

__all__ = ["refine"]

_DAMP = 0.01  # of the mean power, added to the diagonal, as GPTQ does
_LAZY = 128  # channels between products with the whole Gram matrix
# Elements of a row in a piece of the work: few enough rows for a core's cache, enough for the products.
_ROW = 256


def refine(
    weight: np.ndarray, gram: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int, sweeps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Better codes [N, K] int8 and scales [N, blocks] float32 for a weight [N, K] float32 whose inputs have the Gram
    matrix `gram` [K, K], from `sweeps` times over all channels. Positive scales stay positive."""
    better_codes, better_scales = np.empty_like(codes), np.empty_like(scales)

    def work(start: int, stop: int) -> None:
        rows = slice(start, stop)
        found = _descended(weight[rows], gram, codes[rows], scales[rows], bits, sweeps)
        better_codes[rows], better_scales[rows] = (a.T for a in found)

    for_each_chunk(len(weight), _ROW, work)
    return better_codes, better_scales


def _descended(
    weight: np.ndarray, gram: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int, sweeps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [K, N] float32 and scales [blocks, N]: channels first, for each is read and written as a whole."""
    width = weight.shape[1] // scales.shape[1]
    step = max(_LAZY // width, 1) * width
    scales, codes = scales.T.copy(), codes.T.astype(np.float32)
    missing = weight.T - codes * np.repeat(scales, width, axis=0)
    damp = np.float32(_DAMP * np.diag(gram).mean())
    for start in [*range(0, len(codes), step)] * sweeps:
        part = slice(start, min(start + step, len(codes)))
        own = gram[part, part] + damp * np.eye(part.stop - start, dtype=np.float32)
        # Half the slope of the squared error by each weight.
        pull = gram[part] @ missing + damp * missing[part]
        part_scales = scales[part.start // width : part.stop // width]
        _move_codes(codes[part], part_scales, missing[part], pull, own, bits)
        _move_scales(codes[part], part_scales, missing[part], pull, own)
    return codes, scales


def _move_codes(
    codes: np.ndarray, scales: np.ndarray, missing: np.ndarray, pull: np.ndarray, own: np.ndarray, bits: int
) -> None:
    """Each code [k, N] to the best one, one channel after another; `missing` and `pull` follow."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    width, power = len(codes) // len(scales), np.diag(own)
    inverse = reciprocal(scales)

    def decide(i: int, pull: np.ndarray) -> np.ndarray:
        """The change of a channel's weights."""
        code, scale = codes[i], scales[i // width]
        if power[i] <= 0:
            return np.zeros_like(code)
        change = pull * inverse[i // width]
        change /= power[i]
        change += code
        np.minimum(np.maximum(np.rint(change, out=change), low, out=change), high, out=change)
        change -= code
        code += change
        change *= scale
        return change

    changes = decide_rows(pull.copy(), own, decide)
    missing -= changes
    pull -= own @ changes


def _move_scales(codes: np.ndarray, scales: np.ndarray, missing: np.ndarray, pull: np.ndarray, own: np.ndarray) -> None:
    """Each scale [N] of a block to the best one; `missing` and `pull` follow."""
    width = len(codes) // len(scales)
    for b, scale in enumerate(scales):
        block = slice(b * width, (b + 1) * width)
        toward = own[:, block] @ codes[block]
        power = np.einsum("kn,kn->n", codes[block], toward[block])
        slope = np.einsum("kn,kn->n", codes[block], pull[block])
        change = np.divide(slope, power, out=np.zeros_like(scale), where=power > 0)
        change[scale + change <= 0] = 0
        scale += change
        missing[block] -= codes[block] * change
        pull -= toward * change
