"""Inputs of the components that follow an image's grid."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm_edge.errors import BundleError
from mllm_edge.runtime.prompt.learned_grid import How, cell_positions
from mllm_edge.runtime.prompt.windows import grid_windows
from mllm_edge.spec import AspectRatioId, GridMerge, GridRope, GridWindows, ImageSpec, LearnedPositions

__all__ = ["grid_rope", "table_inputs"]


def table_inputs(image: ImageSpec, rows: int, cols: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tables of a grid of rows × cols cells, by the names of the inputs; `arrays`: the bundle's, by file."""
    merge = image.patches.merge if image.patches is not None else 1
    found: dict[str, np.ndarray] = {}
    for table in image.tables:
        if isinstance(table, LearnedPositions):
            made: tuple[np.ndarray, ...] = (_learned(table, arrays[table.file], rows, cols, merge),)
        else:
            made = _TABLES[type(table)](table, rows, cols, merge)
        found |= zip(table.names, made, strict=True)
    return found


def _learned(table: LearnedPositions, array: np.ndarray, rows: int, cols: int, merge: int) -> np.ndarray:
    side, shape = table.side, (table.side**2, table.dim)
    if array.shape != shape:
        raise BundleError(f"{table.file}: {list(array.shape)}, not {list(shape)}", "export the bundle again")
    how: How = "corners" if table.corners else "cubic" if table.cubic else "edges"
    return cell_positions(array.reshape(side, side, table.dim), rows, cols, merge, how, table.bounds)


def grid_rope(rope: GridRope, rows: int, cols: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [rows · cols, merge², dim/2] float32 of the patches of rows × cols cells, in the cells' order."""
    exponents = 4.0 * np.arange(rope.dim // 4) / rope.dim
    both = np.stack([exponents, exponents + 2.0 / rope.dim if rope.alternate else exponents])
    frequencies = (rope.theta**-both).astype(np.float32)
    cell_row, cell_col, row, col = np.indices((rows, cols, merge, merge), np.float32)
    places = np.stack([cell_row * merge + row, cell_col * merge + col], axis=-1)
    angles = (places[..., None] * frequencies).reshape(rows * cols, merge**2, rope.dim // 2)
    return np.cos(angles), np.sin(angles)


def _grid_merge(table: GridMerge, rows: int, cols: int, merge: int) -> tuple[np.ndarray]:
    side = table.side
    whole = np.arange(rows * cols).reshape(rows, cols)[: rows // side * side, : cols // side * side]
    squares = whole.reshape(rows // side, side, cols // side, side).transpose(0, 2, 1, 3)
    return (squares.reshape(-1, side**2),)


def _aspect_ratio_id(table: AspectRatioId, rows: int, cols: int, merge: int) -> tuple[np.ndarray]:
    before = sum(table.max_tiles // r for r in range(1, rows))
    return (np.array([before + cols]),)


_TABLES: Mapping[type, Callable[[Any, int, int, int], tuple[np.ndarray, ...]]] = {
    GridRope: grid_rope,
    GridMerge: _grid_merge,
    GridWindows: grid_windows,
    AspectRatioId: _aspect_ratio_id,
}
