"""The bundle's transforms: from an RGB image to `pixel_values`."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.image import load_image
from mllm_edge.runtime.prompt.transforms.cut import Cut, resized
from mllm_edge.runtime.prompt.transforms.patches import patches_cut, patchified
from mllm_edge.runtime.prompt.transforms.resize import RESIZES
from mllm_edge.runtime.prompt.transforms.tiles import TILES
from mllm_edge.runtime.prompt.transforms.values import VALUES, look_up, with_whole
from mllm_edge.spec import MOST_PIXELS, Patchify, Transform, WholeBefore

__all__ = ["apply_transforms", "cut_of", "first_size"]

_OF_PIXELS = {**RESIZES, **TILES}


def cut_of(height: int, width: int, transforms: Sequence[Transform], frames: tuple[int, int] = (1, 1)) -> Cut:
    """What becomes of an RGB image of `height` × `width` px (upright), without touching pixels: as many slices as
    `apply_transforms` gives; `frames` as of `Cut`. Raises ImageError when the size cannot be processed."""
    if height < 1 or width < 1:
        raise ImageError(f"an image of {height}×{width} px has no pixels", "pass sizes as (height, width) in px")
    cut = Cut(height, width, frames=frames)
    for transform in transforms:
        cut = _cut_after(cut, transform)
    return cut


def first_size(
    height: int, width: int, transforms: Sequence[Transform], frames: tuple[int, int] = (1, 1)
) -> tuple[int, int] | None:
    """The size (height, width) that the first transform brings an image to; None where that is no resize."""
    how = _OF_PIXELS.get(type(transforms[0])) if transforms else None
    if how is None or how.pixels is not resized:
        return None
    after = _cut_after(Cut(height, width, frames=frames), transforms[0])
    return after.height, after.width


def apply_transforms(
    image: Image.Image,
    transforms: Sequence[Transform],
    size: tuple[int, int] | None = None,
    frames: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """Apply `transforms` in order to an RGB image (see `load_image`): `pixel_values` [slices, …] float32 (see
    `ImageSpec`).

    Resizing works on 8-bit pixels. Rescale and Normalize come after it and are exact to float32 rounding. Patchify,
    which gives `pixel_values` another shape, or WholeBefore comes last.
    `size`: that of the image before it was decoded at a smaller scale, as `first_size` allows it. `frames` as of `Cut`.
    Raises ImageError when the image's size cannot be processed, BundleError for an impossible order of transforms.
    """
    if image.mode != "RGB":
        image = load_image(image)
    cut, tiles = Cut(*(size or (image.height, image.width)), frames=frames), [image]
    # 8 bits have 256 values: Rescale and Normalize act on a table of them, and every pixel is looked up once.
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    on_values, last = False, None
    for transform in transforms:
        if last is not None:
            raise BundleError(f"transform {transform.op!r} comes after {last.op}", "export the bundle again")
        after = _cut_after(cut, transform)
        if isinstance(transform, (Patchify, WholeBefore)):
            last = transform
        elif (of_values := VALUES.get(type(transform))) is not None:
            table, on_values = of_values(table, transform), True
        elif on_values:
            raise BundleError(f"transform {transform.op!r} comes after rescale or normalize", "export the bundle again")
        else:
            tiles = _OF_PIXELS[type(transform)].pixels(tiles, transform, after)
        cut = after
    if isinstance(last, WholeBefore):
        return with_whole(look_up(tiles, table), cut.rows, cut.cols)
    if last is None:
        return look_up(tiles, table)
    grids = [patchified(look_up([tile], table)[0], last) for tile in tiles]  # of several sizes
    return grids[0] if len(grids) == 1 else np.concatenate(grids)


def _cut_after(cut: Cut, transform: Transform) -> Cut:
    if type(transform) in VALUES:
        return cut
    if isinstance(transform, WholeBefore):
        return cut._replace(slices=cut.slices + 1)
    if isinstance(transform, Patchify):
        after = patches_cut(cut, transform)
    else:
        after = _OF_PIXELS[type(transform)].cut(cut, transform)
    largest = max(after.height * after.width, math.prod(after.overview or ()))
    if after.height < 1 or after.width < 1 or largest > MOST_PIXELS:
        raise ImageError(
            f"{transform.op} turns {cut.height}×{cut.width} px into {after.height}×{after.width} px",
            "crop the image to a less extreme aspect ratio",
        )
    return after
