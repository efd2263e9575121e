"""Learned positions of a square grid, brought to the grid of an image."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

__all__ = ["How", "cell_positions", "cubic", "interpolated_positions", "learned_places"]

How = Literal["edges", "corners", "cubic"]
_KEYS = -0.75


def cell_positions(
    table: np.ndarray,
    rows: int,
    cols: int,
    merge: int,
    how: How = "edges",
    bounds: Sequence[float] | None = None,
) -> np.ndarray:
    """The learned positions [n, n, D] for rows × cols cells of merge × merge patches: [rows · cols, merge², D] float32,
    in the cells' order; `bounds` as in LearnedPositions."""
    if bounds is not None:
        down, across = (learned_places(bounds, places * merge) for places in (rows, cols))
        places = table[down][:, across].astype(np.float32)
    else:
        places = interpolated_positions(table, rows * merge, cols * merge, how)
    cells = places.reshape(rows, merge, cols, merge, -1).swapaxes(1, 2)
    return cells.reshape(rows * cols, merge**2, -1)


def interpolated_positions(table: np.ndarray, rows: int, cols: int, how: How = "edges") -> np.ndarray:
    """The learned positions [n, n, D] for a grid of rows × cols patches: [rows, cols, D] float32, bilinear, and where
    the grid is smaller an average over all that a place covers. `corners`: without that, the first and the last place
    of a side staying what they are; `cubic`: without that, bicubic."""
    side, _, width = table.shape
    weights = {"edges": _weights, "corners": _weights_between, "cubic": _cubic_weights}[how]
    across = weights(side, cols) @ table.astype(np.float32)
    return (weights(side, rows) @ across.reshape(side, -1)).reshape(rows, cols, width)


def learned_places(bounds: Sequence[float], places: int) -> np.ndarray:
    """Which learned place each of `places` has, [places] int64: that which its beginning lies in. The rounding of this
    arithmetic is part of the trained models, so it is repeated in the same steps."""
    begins = np.arange(places, dtype=np.float32) * (np.float32(1) / np.float32(places))
    return np.searchsorted(np.array(bounds, np.float32), np.minimum(begins, np.float32(1.0 - 1e-6)), side="right")


def _weights(side: int, places: int) -> np.ndarray:
    """[places, side] float32: how much each learned place counts at each of `places`, a triangle around its center."""
    scale = side / places
    centers = (np.arange(places) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(side) - centers[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _weights_between(side: int, places: int) -> np.ndarray:
    """[places, side] float32: how much each learned place counts at each of `places`, which go from the first to the
    last: the two beside it, by their distance. One place alone is the first."""
    centers = np.arange(places) * (side - 1) / max(places - 1, 1)
    return np.maximum(1 - np.abs(np.arange(side) - centers[:, None]), 0).astype(np.float32)


def cubic(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """planes [C, H, W] → [C, height, width] float32, bicubically, and nothing is averaged."""
    for axis, places in ((1, height), (2, width)):
        if planes.shape[axis] == places:
            continue  # each is itself
        shape = [1, places, 1] if axis == 1 else [1, 1, places]
        shares = _cubic_shares(planes.shape[axis], places)
        parts = [np.take(planes, near, axis) * share.astype(np.float32).reshape(shape) for near, share in shares]
        planes = np.sum(parts, axis=0)
    return planes


def _cubic_weights(side: int, places: int) -> np.ndarray:
    """[places, side] float32: how much each learned place counts at each of `places`."""
    weights = np.zeros((places, side))
    for near, share in _cubic_shares(side, places):
        np.add.at(weights, (np.arange(places), near), share)
    return weights.astype(np.float32)


def _cubic_shares(side: int, places: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Four times a place of `side` for each of `places`, and how much it counts there: those around it by Keys' kernel,
    as torch's grid_sample has it (a = −0.75); beyond an edge stands the last."""
    centers = (np.arange(places) + 0.5) * side / places - 0.5
    first = np.floor(centers).astype(np.int64) - 1
    for near in range(4):
        distance = np.abs(centers - (first + near))
        inner = (_KEYS + 2) * distance**3 - (_KEYS + 3) * distance**2 + 1
        outer = _KEYS * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        share = np.where(distance <= 1, inner, np.where(distance < 2, outer, 0))
        yield np.clip(first + near, 0, side - 1), share
