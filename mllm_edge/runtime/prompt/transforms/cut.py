"""What transforms have made of an image so far, and what one of them is: how it changes that, and the pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

__all__ = ["RESAMPLE", "Cut", "How", "resized"]

RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


class Cut(NamedTuple):
    """Slices of `height` × `width` px: a grid of rows × cols, and the overview where there is one more, in the size
    `overview` (height, width) where that is another. `sizes`: of all slices, where each has its own. `grids`: rows and
    columns of cells, of each tile. `frames`: how many share bounds on pixels, and what their number is taken for.
    `shown`: (height, width) of what the image fills of the tiles, at their top left, where that is not all."""

    height: int
    width: int
    rows: int = 1
    cols: int = 1
    slices: int = 1
    overview: tuple[int, int] | None = None
    grids: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    frames: tuple[int, int] = (1, 1)
    shown: tuple[int, int] | None = None


def resized(tiles: list[Image.Image], transform: Any, after: Cut) -> list[Image.Image]:
    """Images stretched to the slices' size."""
    size = (after.width, after.height)
    resample = RESAMPLE[transform.resample]
    return [tile if tile.size == size else tile.resize(size, resample) for tile in tiles]


class How(NamedTuple):
    """A transform of pixels: `cut` tells what becomes of sizes, `pixels` (images, transform, cut behind it) does it."""

    cut: Callable[[Cut, Any], Cut]
    pixels: Callable[[list[Image.Image], Any, Cut], list[Image.Image]] = resized
