"""AWQ: channels that matter for the output are scaled up before rounding, and the largest weights may be clipped.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024, section 3.2.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.rtn import rounded_blocks

__all__ = ["clipped_scales", "scaling"]

_RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)
_STEP = 0.1  # to what is tried on both sides of the best
_SMALLEST = 1e-3  # of the largest column: what is less counts as that
_CLIPS = np.linspace(1.0, 0.5, 21, dtype=np.float32)
Rounded = Callable[[np.ndarray], np.ndarray]


def scaling(
    weights: Sequence[np.ndarray], sample: np.ndarray, channel_mean: np.ndarray, rounded: Rounded
) -> np.ndarray:
    """Factors s [K] float32 for layers [N, K] that share an input: x / s and W · s take the places of x and W.

    s = mean|x|^r, or mean|x|^r / |w|^(1−r) with the root mean square |w| of each column, normalized; r in [0, 0.9] and
    the way with the smallest error of the outputs for the rows of `sample` [n, K]. The second way also evens
    out columns, so that large ones do not make the scale of the small ones beside them. `rounded` returns what a weight
    is after quantization.
    """
    mean = np.maximum(channel_mean, 1e-4)
    columns = np.sqrt(np.mean([np.square(weight).mean(axis=0) for weight in weights], axis=0))
    columns = np.maximum(columns, max(_SMALLEST * float(columns.max()), 1e-30))

    def factors(ratio: float, even: bool) -> np.ndarray:
        s = mean**ratio / (columns ** (1 - ratio) if even else 1)
        return (s / np.sqrt(s.max() * s.min())).astype(np.float32)

    def error(ratio: float, even: bool) -> float:
        s = factors(ratio, even)
        return sum(_changed(weight, s, sample / s, rounded) for weight in weights)

    errors = {(ratio, even): error(ratio, even) for even in (False, True) for ratio in _RATIOS}
    ratio, even = min(errors, key=errors.__getitem__)
    errors |= {(r, even): error(r, even) for r in (ratio - _STEP, ratio + _STEP) if r >= 0}
    return factors(*min(errors, key=errors.__getitem__))


def _changed(weight: np.ndarray, factors: np.ndarray, inputs: np.ndarray, rounded: Rounded) -> float:
    """Σ over `inputs` [n, K] of the squared change of the outputs when weight · factors is rounded."""
    totals = np.zeros(len(weight), np.float32)

    def work(start: int, stop: int) -> None:
        scaled = weight[start:stop] * factors
        difference = rounded(scaled)
        difference -= scaled
        outputs = inputs @ difference.T
        totals[start:stop] = np.einsum("ij,ij->j", outputs, outputs)

    for_each_chunk(len(weight), weight.shape[1], work)
    return float(totals.sum(dtype=np.float64))


def clipped_scales(weight: np.ndarray, sample: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Scales [N, blocks] float32 of a weight [N, K] (K whole blocks): the largest magnitude of each block, clipped by
    the factor that changes the block's part of the output for `sample` [n, K] least."""
    rows, row = weight.shape
    blocks = row // block
    top = (1 << (bits - 1)) - 1
    scales = np.empty((rows, blocks), np.float32)
    # Per block: Σ over samples of (x · Δw)² = Δw G Δwᵀ with G = xᵀx of the block's channels.
    for b in range(blocks):
        columns = slice(b * block, (b + 1) * block)
        x = sample[:, columns]
        gram = x.T @ x
        part = weight[:, columns]
        peak = np.abs(part).max(axis=1)
        best = np.full(rows, np.inf, np.float32)
        for clip in _CLIPS:
            scale = peak * (clip / top)
            difference = rounded_blocks(part, scale, bits) - part
            error = np.einsum("nk,nk->n", difference @ gram, difference)
            better = error < best
            best[better] = error[better]
            scales[better, b] = scale[better]
    return scales
