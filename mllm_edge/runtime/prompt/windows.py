"""Windows over an image's grid of cells, for towers whose layers look only at a part of the image."""

import numpy as np

from mllm_edge.runtime.backends.base import HIDDEN
from mllm_edge.spec import GridWindows

__all__ = ["grid_windows"]


def grid_windows(table: GridWindows, rows: int, cols: int, merge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """window_index [windows, side²] int64, window_bias [windows, 1, W, W] float32 with W = side² · merge², cell_index
    [rows · cols] int64, of rows × cols cells of merge × merge patches."""
    side = table.side
    down, across = -(-rows // side), -(-cols // side)
    padded = np.full((down * side, across * side), -1, np.int64)
    padded[:rows, :cols] = np.arange(rows * cols).reshape(rows, cols)
    index = padded.reshape(down, side, across, side).swapaxes(1, 2).reshape(down * across, side**2)
    seen = index >= 0
    cell_index = np.empty(rows * cols, np.int64)
    cell_index[index[seen]] = np.flatnonzero(seen)
    keys = np.where(seen.repeat(merge**2, axis=1), np.float32(0), np.float32(HIDDEN))
    bias = np.ascontiguousarray(np.broadcast_to(keys[:, None, None], (len(keys), 1, keys.shape[1], keys.shape[1])))
    return np.maximum(index, 0), bias, cell_index
