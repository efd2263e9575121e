"""Pictures to measure with."""

import numpy as np

__all__ = ["frame"]


def frame(seed: int, edge: int) -> np.ndarray:
    """A square picture [edge, edge, 3] of uint8 without noise, which costs what a photograph costs."""
    ramp = np.linspace(0, 255, edge, dtype=np.float32)
    plane = (ramp[:, None] * (1 + seed % 3) + ramp) % 256
    return np.stack([plane, plane.T, 255 - plane], axis=-1).astype(np.uint8)
