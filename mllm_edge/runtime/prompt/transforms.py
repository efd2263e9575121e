"""The bundle's transforms: from an RGB image to `pixel_values`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.image import load_image
from mllm_edge.spec import (
    CenterCrop,
    Normalize,
    PadToSquare,
    Patchify,
    Rescale,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    ResizeToMultiple,
    ResizeToPixels,
    SelectTiles,
    SplitTiles,
    Transform,
)

__all__ = ["ProcessedImage", "apply_transforms", "first_size", "tile_grid"]

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

# A strip that is scaled by its shorter side grows along the other; Pillow refuses files of more pixels, too.
_MOST_PIXELS = 178_956_970


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """`pixel_values` [tiles, channels, height, width] float32, and the grid the image was cut into.

    A grid of (0, 0) means one tile. Otherwise there are rows × cols tiles, row by row, then the overview, if any.
    After Patchify: rows × cols cells, `pixel_values` [cells, merge², channels · frames · patch²].
    """

    pixel_values: np.ndarray
    rows: int
    cols: int


class _Layout(NamedTuple):
    """Tile size in px, grid and number of tiles after some transforms."""

    height: int
    width: int
    rows: int = 0
    cols: int = 0
    tiles: int = 1


def tile_grid(height: int, width: int, transforms: Sequence[Transform]) -> tuple[int, int, int]:
    """(rows, cols, tiles) of an RGB image of `height` × `width` px, without touching pixels.

    Equal to the grid and the number of tiles that `apply_transforms` gives; the size is that of the upright image.
    Raises ImageError when the size cannot be processed.
    """
    if height < 1 or width < 1:
        raise ImageError(f"an image of {height}×{width} px has no pixels", "pass sizes as (height, width) in px")
    layout = _Layout(height, width)
    for transform in transforms:
        layout = _layout_after(layout, transform)
    return layout.rows, layout.cols, layout.tiles


def first_size(height: int, width: int, transforms: Sequence[Transform]) -> tuple[int, int] | None:
    """The size (height, width) that the first transform brings an image to; None where that is no resize."""
    if not transforms or type(transforms[0]) not in _LAYOUTS or isinstance(transforms[0], (*_PIXELS, Patchify)):
        return None
    after = _layout_after(_Layout(height, width), transforms[0])
    return after.height, after.width


def apply_transforms(
    image: Image.Image, transforms: Sequence[Transform], size: tuple[int, int] | None = None
) -> ProcessedImage:
    """Apply `transforms` in order to an RGB image (see `load_image`): `pixel_values` [tiles, 3, H, W] float32.

    Resizing works on 8-bit pixels. Rescale and Normalize come after it and are exact to float32 rounding. Patchify
    comes last and gives `pixel_values` another shape (see `ProcessedImage`).
    `size`: that of the image before it was decoded at a smaller scale, as `first_size` allows it.
    Raises ImageError when the image's size cannot be processed, BundleError for an impossible order of transforms.
    """
    if image.mode != "RGB":
        image = load_image(image)
    layout, tiles = _Layout(*(size or (image.height, image.width))), [image]
    # 8 bits have 256 values: Rescale and Normalize act on a table of them, and every pixel is looked up once.
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    on_values, cells = False, None
    for transform in transforms:
        if cells is not None:
            raise BundleError(f"transform {transform.op!r} comes after patchify", "export the bundle again")
        if isinstance(transform, Patchify):
            layout, cells = _layout_after(layout, transform), transform
        elif isinstance(transform, (Rescale, Normalize)):
            table, on_values = _VALUES[type(transform)](table, transform), True
        elif on_values:
            raise BundleError(f"transform {transform.op!r} comes after rescale or normalize", "export the bundle again")
        else:
            after = _layout_after(layout, transform)
            tiles = _PIXELS.get(type(transform), _resize)(tiles, transform, after)
            layout = after
    pixel_values = _look_up(tiles, table)
    if cells is not None:
        pixel_values = _patchify(pixel_values[0], cells, layout)
    return ProcessedImage(pixel_values, layout.rows, layout.cols)


def _layout_after(layout: _Layout, transform: Transform) -> _Layout:
    if isinstance(transform, (Rescale, Normalize)):
        return layout
    after = _LAYOUTS[type(transform)](layout, transform)
    if after.height < 1 or after.width < 1 or after.height * after.width > _MOST_PIXELS:
        raise ImageError(
            f"{transform.op} turns {layout.height}×{layout.width} px into {after.height}×{after.width} px",
            "crop the image to a less extreme aspect ratio",
        )
    return after


# The order of roundings below is part of the contract: token counts and pixels depend on it.
def _resize_longest_edge_layout(layout: _Layout, transform: ResizeLongestEdge) -> _Layout:
    height, width = layout.height, layout.width
    ratio = width / height
    if width >= height:
        width = transform.longest_edge
        height = max(1, _even(int(width / ratio)))
    else:
        height = transform.longest_edge
        width = max(1, _even(int(height * ratio)))
    if max(height, width) > transform.limit:
        ratio = width / height
        if width >= height:
            width = transform.limit
            height = max(1, int(width / ratio))
        else:
            height = transform.limit
            width = max(1, int(height * ratio))
    return layout._replace(height=height, width=width)


def _resize_shortest_edge_layout(layout: _Layout, transform: ResizeShortestEdge) -> _Layout:
    edge, height, width = transform.shortest_edge, layout.height, layout.width
    if width <= height:
        return layout._replace(height=int(edge * height / width), width=edge)
    return layout._replace(height=edge, width=int(edge * width / height))


def _resize_to_multiple_layout(layout: _Layout, transform: ResizeToMultiple) -> _Layout:
    height, width, multiple = layout.height, layout.width, transform.multiple
    ratio = width / height
    if width >= height:
        width = _round_up(width, multiple)
        height = _round_up(int(width / ratio), multiple)
    else:
        height = _round_up(height, multiple)
        width = _round_up(int(height * ratio), multiple)
    return layout._replace(height=height, width=width)


def _fixed_layout(layout: _Layout, transform: Resize | CenterCrop) -> _Layout:
    return layout._replace(height=transform.height, width=transform.width)


def _pad_to_square_layout(layout: _Layout, transform: PadToSquare) -> _Layout:
    side = max(layout.height, layout.width)
    return layout._replace(height=side, width=side)


def _split_tiles_layout(layout: _Layout, transform: SplitTiles) -> _Layout:
    size = transform.size
    if layout.tiles > 1:
        raise BundleError("split_tiles comes after split_tiles", "export the bundle again")
    if layout.height % size or layout.width % size:
        raise ImageError(
            f"{layout.height}×{layout.width} px cannot be cut into whole tiles of {size}×{size} px",
            "the bundle must resize to a multiple of the tile before it splits: export it again",
        )
    rows, cols = layout.height // size, layout.width // size
    return layout if rows * cols == 1 else _Layout(size, size, rows, cols, rows * cols + 1)


def _select_tiles_layout(layout: _Layout, transform: SelectTiles) -> _Layout:
    if layout.tiles > 1:
        raise BundleError("select_tiles comes after another split", "export the bundle again")
    size = transform.size
    rows, cols = _nearest_grid(layout.height, layout.width, transform)
    if rows * cols == 1:
        return _Layout(size, size)
    return _Layout(size, size, rows, cols, rows * cols + int(transform.overview))


def _nearest_grid(height: int, width: int, transform: SelectTiles) -> tuple[int, int]:
    """(rows, cols) of the grid that SelectTiles describes."""
    least, most = transform.min_tiles, transform.max_tiles
    grids = [(rows, cols) for cols in range(1, most + 1) for rows in range(-(-least // cols), most // cols + 1)]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    ratio, area = width / height, width * height
    best, nearest = (1, 1), math.inf
    for rows, cols in grids:
        distance = abs(ratio - cols / rows)
        fits = area > 0.5 * transform.size * transform.size * cols * rows
        if distance < nearest or (distance == nearest and fits):
            best, nearest = (rows, cols), distance
    return best


def _resize_to_pixels_layout(layout: _Layout, transform: ResizeToPixels) -> _Layout:
    height, width, multiple = layout.height, layout.width, transform.multiple
    if max(height, width) / min(height, width) > transform.max_ratio:
        raise ImageError(
            f"an image of {height}×{width} px: one side is more than {transform.max_ratio:g} times the other",
            "crop the image to a less extreme aspect ratio",
        )
    rows, cols = round(height / multiple), round(width / multiple)
    area = rows * cols * multiple**2
    if area > transform.max_pixels:
        shrink = math.sqrt(height * width / transform.max_pixels)
        rows, cols = (max(1, math.floor(side / shrink / multiple)) for side in (height, width))
    elif area < transform.min_pixels:
        grow = math.sqrt(transform.min_pixels / (height * width))
        rows, cols = (math.ceil(side * grow / multiple) for side in (height, width))
    return layout._replace(height=rows * multiple, width=cols * multiple)


def _patchify_layout(layout: _Layout, transform: Patchify) -> _Layout:
    side = transform.patch * transform.merge
    if layout.rows:
        raise BundleError("patchify comes after a transform that makes tiles", "export the bundle again")
    if layout.height % side or layout.width % side:
        raise ImageError(
            f"{layout.height}×{layout.width} px cannot be cut into whole cells of {side}×{side} px",
            "the bundle must resize to a multiple of the cell before it cuts: export it again",
        )
    rows, cols = layout.height // side, layout.width // side
    return _Layout(side, side, rows, cols, rows * cols)


_LAYOUTS: dict[type, Callable[[_Layout, Any], _Layout]] = {
    ResizeLongestEdge: _resize_longest_edge_layout,
    ResizeShortestEdge: _resize_shortest_edge_layout,
    ResizeToMultiple: _resize_to_multiple_layout,
    Resize: _fixed_layout,
    CenterCrop: _fixed_layout,
    PadToSquare: _pad_to_square_layout,
    SplitTiles: _split_tiles_layout,
    SelectTiles: _select_tiles_layout,
    ResizeToPixels: _resize_to_pixels_layout,
    Patchify: _patchify_layout,
}


def _even(length: int) -> int:
    return length + length % 2


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _resize(tiles: list[Image.Image], transform: Any, after: _Layout) -> list[Image.Image]:
    size = (after.width, after.height)
    resample = _RESAMPLE[transform.resample]
    return [tile if tile.size == size else tile.resize(size, resample) for tile in tiles]


def _split(tiles: list[Image.Image], transform: SplitTiles, after: _Layout) -> list[Image.Image]:
    if after.tiles == 1:
        return tiles
    image, size = tiles[0], transform.size
    overview = image.resize((size, size), _RESAMPLE[transform.resample])
    return [*_cut(image, size, after), overview]


def _select(tiles: list[Image.Image], transform: SelectTiles, after: _Layout) -> list[Image.Image]:
    if after.tiles == 1:
        return _resize(tiles, transform, after)
    canvas = _Layout(after.rows * transform.size, after.cols * transform.size)
    cut = _cut(_resize(tiles, transform, canvas)[0], transform.size, after)
    # The overview is made from the image itself, not from the stretched one.
    return [*cut, *_resize(tiles, transform, after)] if transform.overview else cut


def _cut(image: Image.Image, size: int, grid: _Layout) -> list[Image.Image]:
    corners = [(col * size, row * size) for row in range(grid.rows) for col in range(grid.cols)]
    return [image.crop((x, y, x + size, y + size)) for x, y in corners]


def _crop(tiles: list[Image.Image], transform: CenterCrop, after: _Layout) -> list[Image.Image]:
    # Floor division also of negative offsets; what lies outside the image comes out black.
    left, top = (tiles[0].width - after.width) // 2, (tiles[0].height - after.height) // 2
    return [tile.crop((left, top, left + after.width, top + after.height)) for tile in tiles]


def _pad(tiles: list[Image.Image], transform: PadToSquare, after: _Layout) -> list[Image.Image]:
    padded = []
    for tile in tiles:
        square = Image.new("RGB", (after.width, after.height), transform.color)
        square.paste(tile, ((after.width - tile.width) // 2, (after.height - tile.height) // 2))
        padded.append(square)
    return padded


# What is not here only resizes to the size of its layout.
_PIXELS: dict[type, Callable[[list[Image.Image], Any, _Layout], list[Image.Image]]] = {
    CenterCrop: _crop,
    PadToSquare: _pad,
    SplitTiles: _split,
    SelectTiles: _select,
}


def _rescale(table: np.ndarray, transform: Rescale) -> np.ndarray:
    return (table.astype(np.float64) * transform.factor).astype(np.float32)


def _normalize(table: np.ndarray, transform: Normalize) -> np.ndarray:
    mean, std = (np.array(values, np.float32)[:, None] for values in (transform.mean, transform.std))
    if len(mean) != len(table) or len(std) != len(table):
        raise BundleError(f"normalize has {len(mean)} means and {len(std)} stds", "export the bundle again")
    return (table - mean) / std


_VALUES: dict[type, Callable[[np.ndarray, Any], np.ndarray]] = {Rescale: _rescale, Normalize: _normalize}


def _look_up(tiles: list[Image.Image], table: np.ndarray) -> np.ndarray:
    width, height = tiles[0].size
    pixel_values = np.empty((len(tiles), len(table), height, width), np.float32)
    for tile, planes in zip(tiles, pixel_values, strict=True):
        pixels = np.asarray(tile)
        for channel, plane in enumerate(planes):
            # uint8 indices are always in range; "clip" only spares numpy a buffer.
            np.take(table[channel], pixels[..., channel], out=plane, mode="clip")
    return pixel_values


def _patchify(planes: np.ndarray, transform: Patchify, layout: _Layout) -> np.ndarray:
    """planes [C, height, width] → cells [cells, merge², C · frames · patch²]."""
    channels, merge, patch = len(planes), transform.merge, transform.patch
    split = planes.reshape(channels, layout.rows, merge, patch, layout.cols, merge, patch)
    places = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    frames = np.broadcast_to(places, (*places.shape[:5], transform.frames, patch, patch))
    return frames.reshape(layout.tiles, merge**2, -1)
