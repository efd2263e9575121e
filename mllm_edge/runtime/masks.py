"""Attention masks on the host: whatever a token may not see becomes one additive bias."""

import numpy as np

__all__ = ["HIDDEN", "causal_bias"]

# Within half precision's range; e^−30000 is 0 in every float type.
HIDDEN = -30000.0


def causal_bias(past: int, tokens: int, window: int | None = None) -> np.ndarray:
    """Bias [1, 1, S, L] float32 for S new tokens behind `past` others, L = past + S: 0 where visible, else HIDDEN.

    A token sees itself and what came before, or with `window` only the latest `window` of these.
    """
    queries = past + np.arange(tokens)[:, None]
    keys = np.arange(past + tokens)[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return np.where(visible, np.float32(0), np.float32(HIDDEN))[None, None]
