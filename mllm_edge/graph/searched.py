"""Round to nearest with a scale for each block that is searched for: no data, a few passes over the weight."""

import numpy as np

from mllm_edge.graph import rtn
from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.scales import reciprocal

__all__ = ["quantize_blocks", "quantize_channels"]

# Of the scale that holds a block's peak: more rounds finer and clips.
_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.2)
_POSITIVE = np.float32(1e-45)  # the smallest number that is

quantize_channels = rtn.quantize_channels


def quantize_blocks(
    weight: np.ndarray, bits: int, block: int, positive_scales: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """As `rtn.quantize_blocks`, with the codes and scale of each block for which Σ |w| · (w − code · scale)² is least.

    Large weights count more, as they do for the output: on trained decoders 15 to 20% less divergence than with all
    weights alike. For given codes the best scale is Σ|w|·w·code / Σ|w|·code².
    """
    rows, row = weight.shape
    blocks, zero = -(-row // block), 1 << (bits - 1)
    codes, scales = np.empty((rows, blocks, block), np.uint8), np.empty((rows, blocks), np.float32)

    def work(start: int, stop: int) -> None:
        grouped = rtn.in_blocks(weight[start:stop], block)
        importance = np.abs(grouped)
        scales[start:stop] = rtn.peak_scales(grouped, importance, zero, positive_scales)
        _search(grouped, importance, zero, codes[start:stop], scales[start:stop])

    for_each_chunk(rows, row, work)
    return codes, scales


def _search(grouped: np.ndarray, importance: np.ndarray, zero: int, codes: np.ndarray, scales: np.ndarray) -> None:
    """Fill `codes` for the blocks [n, blocks, block], and better `scales`; they hold those of rounding to nearest."""
    relative = grouped * reciprocal(scales)[..., None]
    best, chosen = np.zeros_like(scales), np.ones_like(scales)
    tried, weighted = np.empty_like(grouped), np.empty_like(grouped)
    for factor in _FACTORS:
        _rounded(relative, np.float32(factor), zero, tried)
        np.multiply(importance, tried, out=weighted)
        along = np.einsum("nbk,nbk->nb", weighted, grouped)
        power = np.maximum(np.einsum("nbk,nbk->nb", weighted, tried), _POSITIVE)
        gain = np.square(along) / power  # what the best scale takes off Σ |w|·w²
        better = gain > best
        np.maximum(best, gain, out=best)
        np.copyto(chosen, np.float32(factor), where=better)
        np.copyto(scales, along / power, where=better)
    _rounded(relative, chosen[..., None], zero, tried)
    np.add(tried, zero, out=codes, casting="unsafe")


def _rounded(relative: np.ndarray, factor: np.ndarray | np.float32, zero: int, out: np.ndarray) -> None:
    """Fill `out` with the integers next to `relative` · `factor` that codes around `zero` hold."""
    np.multiply(relative, factor, out=out)
    np.rint(out, out=out)
    np.clip(out, -zero, zero - 1, out=out)
