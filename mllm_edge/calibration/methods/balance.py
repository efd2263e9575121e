"""Factors for inputs that have a scale for each token: errors of inputs and of weights in balance.

A row x of peak r is rounded in steps that follow r, a row w of a weight in steps that follow its own peak; both errors
of the output, channel by channel, are even when a channel's factor is √(x/w) in their root mean squares. Largest
values, which SmoothQuant takes, say too much of single tokens.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["balancing"]

_SMALLEST = 1e-12


def balancing(weights: Sequence[np.ndarray], rows: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Factors s [K] float32 for layers [N, K] that share an input, of which `rows` [n, K] are a sample.

    s = rms(x)^α / rms(W / its rows' peaks)^(1−α) per channel, of geometric mean 1; the largest of the layers counts.
    Channels that were never used keep factor 1.
    """
    inputs = _rms(rows)
    relative = [w / np.maximum(np.abs(w).max(axis=1, keepdims=True), _SMALLEST) for w in weights]
    outputs = np.max([_rms(w) for w in relative], axis=0)
    alive = (inputs > _SMALLEST) & (outputs > _SMALLEST)
    if not alive.any():
        return np.ones(len(inputs), np.float32)
    log = alpha * np.log(np.maximum(inputs, _SMALLEST)) - (1 - alpha) * np.log(np.maximum(outputs, _SMALLEST))
    return np.where(alive, np.exp(log - log[alive].mean()), 1.0).astype(np.float32)


def _rms(rows: np.ndarray) -> np.ndarray:
    """Of each column."""
    return np.sqrt(np.square(rows).mean(axis=0))
