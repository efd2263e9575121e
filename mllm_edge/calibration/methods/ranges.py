"""Ranges of activations: which part of what was seen 8 bits have to tell apart."""

import numpy as np

from mllm_edge.calibration.statistics import Histogram, InputStatistics
from mllm_edge.graph.precision import Range, RangeMethod

__all__ = ["SEARCHED", "activation_range", "entropy_limit", "mse_limit", "percentile_limit"]

# What `search` tries; the caller judges by the outputs.
SEARCHED: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy", "mse")
_PERCENTILE = 99.99
_LEVELS = 128  # of one sign
_CANDIDATES = 64


def activation_range(statistics: InputStatistics, method: RangeMethod, factors: np.ndarray | None = None) -> Range:
    """The range (lowest, highest) that is represented, zero included; values outside are clipped.

    `factors` [K]: the input will be x / factors. minmax: all that was seen. percentile: all but 0.01 % of it. entropy:
    the limit whose 128 levels lose the least information (Kullback-Leibler divergence of the clipped, rounded
    distribution; Migacz, GTC 2017). mse: the limit with the smallest mean squared error of rounding and clipping.
    """
    if statistics.rows == 0:
        return -1.0, 1.0
    scale = np.float32(1.0) if factors is None else 1 / factors
    lowest = min(float((statistics.channel_low * scale).min()), 0.0)
    highest = max(float((statistics.channel_high * scale).max()), 0.0)
    if lowest == highest:
        return -1.0, 1.0
    if method == "minmax":
        return lowest, highest
    histogram = statistics.histogram if factors is None else statistics.scaled_histogram(factors)
    limit = {"percentile": percentile_limit, "entropy": entropy_limit, "mse": mse_limit}[method](histogram)
    return max(lowest, -limit), min(highest, limit)


def percentile_limit(histogram: Histogram, percentile: float = _PERCENTILE) -> float:
    """The magnitude that `percentile` percent of the values don't exceed, to a bin's width."""
    magnitudes = _magnitudes(histogram)
    wanted = magnitudes.sum() * percentile / 100
    index = int(np.searchsorted(np.cumsum(magnitudes), wanted))
    return float(histogram.limit * min(index + 1, len(magnitudes)) / len(magnitudes))


def entropy_limit(histogram: Histogram) -> float:
    """The limit at which 128 levels of magnitude describe the clipped distribution best."""
    magnitudes = _magnitudes(histogram).astype(np.float64)
    total = len(magnitudes)
    ends = np.unique(np.linspace(_LEVELS, total, _CANDIDATES).astype(int))
    divergences = [_divergence(magnitudes, int(end)) for end in ends]
    return float(histogram.limit * ends[int(np.argmin(divergences))] / total)


def mse_limit(histogram: Histogram) -> float:
    """The limit with the smallest mean squared error, rounding to 128 levels of magnitude and clipping together."""
    magnitudes = _magnitudes(histogram).astype(np.float64)
    centres = (np.arange(len(magnitudes)) + 0.5) * histogram.limit / len(magnitudes)
    limits = histogram.limit * np.linspace(1 / _CANDIDATES, 1.0, _CANDIDATES)

    def error(limit: float) -> float:
        inside = centres <= limit
        rounding = magnitudes[inside].sum() * (limit / (_LEVELS - 1)) ** 2 / 12
        return float(rounding + (magnitudes[~inside] * (centres[~inside] - limit) ** 2).sum())

    return float(limits[int(np.argmin([error(limit) for limit in limits]))])


def _magnitudes(histogram: Histogram) -> np.ndarray:
    """Counts by magnitude, from zero up: the two halves of the histogram folded."""
    half = len(histogram.counts) // 2
    return histogram.counts[half:] + histogram.counts[half - 1 :: -1]


def _divergence(magnitudes: np.ndarray, end: int) -> float:
    """KL(p ‖ q): p the first `end` bins with all beyond put into the last, q the same rounded to `_LEVELS` levels.

    Bins that hold nothing stay empty in q: a level's mass is spread over those of its bins that are in use.
    """
    p = magnitudes[:end].copy()
    level = np.arange(end) * _LEVELS // end
    used = p > 0
    mass = np.bincount(level, p, _LEVELS)
    members = np.bincount(level, used, _LEVELS)
    q = np.where(used, mass[level] / np.maximum(members, 1)[level], 0.0)
    p[-1] += magnitudes[end:].sum()
    if p[-1] > 0 and q[-1] == 0:
        q[-1] = 1e-3 * p[-1]
    p, q = p / p.sum(), q / q.sum()
    both = p > 0
    return float((p[both] * np.log(p[both] / q[both])).sum())
