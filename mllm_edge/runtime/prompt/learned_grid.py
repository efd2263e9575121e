"""Learned positions of a square grid, brought to the grid of an image."""

import numpy as np

__all__ = ["cell_positions", "interpolated_positions"]


def cell_positions(table: np.ndarray, rows: int, cols: int, merge: int) -> np.ndarray:
    """The learned positions [n, n, D] for rows × cols cells of merge × merge patches: [rows · cols, merge², D] float32,
    in the cells' order."""
    places = interpolated_positions(table, rows * merge, cols * merge)
    cells = places.reshape(rows, merge, cols, merge, -1).swapaxes(1, 2)
    return cells.reshape(rows * cols, merge**2, -1)


def interpolated_positions(table: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The learned positions [n, n, D] for a grid of rows × cols patches: [rows, cols, D] float32, bilinear, and where
    the grid is smaller an average over all that a place covers."""
    side, _, width = table.shape
    across = _weights(side, cols) @ table.astype(np.float32)
    return (_weights(side, rows) @ across.reshape(side, -1)).reshape(rows, cols, width)


def _weights(side: int, places: int) -> np.ndarray:
    """[places, side] float32: how much each learned place counts at each of `places`, a triangle around its center."""
    scale = side / places
    centers = (np.arange(places) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(side) - centers[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
