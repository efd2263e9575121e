"""What follows an image's grid: the inputs of the vision encoder, and the positions of the image's tokens."""

from collections.abc import Iterator, Sequence

import numpy as np

from mllm_edge.runtime.limits import TILES_PER_RUN
from mllm_edge.spec import GridRope, ImageSpec

__all__ = ["encoder_feeds", "grid_positions", "grid_rope_tables"]


def encoder_feeds(
    image: ImageSpec, pixel_values: np.ndarray, grids: Sequence[tuple[int, int]], tiles: int = TILES_PER_RUN
) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of every run of the vision encoder: so many `tiles` at a time, or, where images are cells, one image.

    `pixel_values` holds the tiles or cells of all images in order, `grids` the (rows, cols) of each image.
    """
    if image.cells is None:
        for start in range(0, len(pixel_values), tiles):
            yield {"pixel_values": pixel_values[start : start + tiles]}
        return
    start = 0
    for rows, cols in grids:
        feeds = {"pixel_values": pixel_values[start : start + rows * cols]}
        for table in image.tables:
            feeds["cos"], feeds["sin"] = grid_rope_tables(table, rows, cols, image.cells.merge)
        yield feeds
        start += rows * cols


def grid_rope_tables(rope: GridRope, rows: int, cols: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [rows · cols, merge², dim/2] float32 of the patches of rows × cols cells, in the cells' order."""
    frequencies = (rope.theta ** (-4.0 * np.arange(rope.dim // 4) / rope.dim)).astype(np.float32)
    cell_row, cell_col, row, col = np.indices((rows, cols, merge, merge), np.float32)
    places = np.stack([cell_row * merge + row, cell_col * merge + col], axis=-1)
    angles = (places[..., None] * frequencies).reshape(rows * cols, merge**2, rope.dim // 2)
    return np.cos(angles), np.sin(angles)


def grid_positions(tokens: int, starts: Sequence[int], grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions [3, tokens] int64 of a prompt in which images of these (rows, cols) begin at the places `starts`; see
    `PositionSpec.images`."""
    pieces, place, position = [], 0, 0
    for start, (rows, cols) in zip(starts, grids, strict=True):
        pieces.append(_text_positions(position, start - place))
        position += start - place
        pieces.append(position + np.indices((1, rows, cols)).reshape(3, -1))
        place, position = start + rows * cols, position + max(rows, cols)
    pieces.append(_text_positions(position, tokens - place))
    return np.concatenate(pieces, axis=1)


def _text_positions(first: int, tokens: int) -> np.ndarray:
    """Consecutive positions, the same on all axes."""
    return np.tile(np.arange(first, first + tokens), (3, 1))
