"""SmoothQuant: outliers of activations are moved into the weights, where 8 bits per channel can bear them.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023, eq. 4.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["ALPHA", "smoothing"]

ALPHA = 0.5
_SMALLEST = 1e-5


def smoothing(weights: Sequence[np.ndarray], channel_max: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Factors s [K] float32 for layers [N, K] that share an input: x / s and W · s take the places of x and W.

    s = max|x|^α / max|W|^(1−α) per channel; channels that were never used keep factor 1.
    """
    weight_max = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
    alive = (channel_max > _SMALLEST) & (weight_max > _SMALLEST)
    safe_x, safe_w = np.maximum(channel_max, _SMALLEST), np.maximum(weight_max, _SMALLEST)
    factors = safe_x**alpha / safe_w ** (1 - alpha)
    return np.where(alive, factors, 1.0).astype(np.float32)
