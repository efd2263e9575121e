"""Images on a canvas of tiles, top left, as Llama 3.2 Vision sees them."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Canvas", "canvas_of", "canvas_tiles", "with_missing_tiles"]


class Canvas(NamedTuple):
    """A grid of `rows` × `cols` tiles, and the size (height, width) of the image on it. `aspect_ratio_id`: the grid's
    place, from 1, among all those of as many tiles as there may be, by their rows and then columns."""

    rows: int
    cols: int
    height: int
    width: int
    aspect_ratio_id: int

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self.rows * self.cols


def canvas_of(height: int, width: int, tile: int, most: int) -> Canvas:
    """The canvas of at most `most` tiles of `tile` × `tile` px for an image of height × width px: the one that enlarges
    it least; where all shrink it, the one that shrinks it least; of several, the one with the fewest tiles."""
    grids = [(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
    scales = [min(rows * tile / height, cols * tile / width) for rows, cols in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    fitting = [i for i, scale in enumerate(scales) if scale == chosen]
    best = min(fitting, key=lambda i: grids[i][0] * grids[i][1])
    rows, cols = grids[best]
    return Canvas(rows, cols, *_fitted(height, width, tile, (rows * tile, cols * tile)), best + 1)


def _fitted(height: int, width: int, tile: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image on the canvas: as large as it is, but within the canvas and not smaller than a tile
    on the side that decides."""
    high, wide = min(max(height, tile), canvas[0]), min(max(width, tile), canvas[1])
    down, across = high / height, wide / width
    if across < down:
        return min(max(math.floor(height * across), 1), high), wide
    return high, min(max(math.floor(width * down), 1), wide)


def canvas_tiles(
    image: Image.Image, canvas: Canvas, tile: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> list[Image.Image]:
    """The tiles of an RGB image, row by row; what it leaves free of the canvas is black."""
    whole = Image.new("RGB", (canvas.cols * tile, canvas.rows * tile))
    whole.paste(image.resize((canvas.width, canvas.height), resample), (0, 0))
    corners = [(col * tile, row * tile) for row in range(canvas.rows) for col in range(canvas.cols)]
    return [whole.crop((x, y, x + tile, y + tile)) for x, y in corners]


def with_missing_tiles(pixel_values: np.ndarray, most: int) -> np.ndarray:
    """pixel_values [tiles, C, tile, tile] → [most, C, tile, tile]: those that are missing are zero, after all
    transforms."""
    found = np.zeros((most, *pixel_values.shape[1:]), pixel_values.dtype)
    found[: len(pixel_values)] = pixel_values
    return found
