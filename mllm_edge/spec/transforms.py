"""How pixels become what a vision encoder takes: named steps, one dataclass each."""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "MOST_PIXELS",
    "CenterCrop",
    "CoverTiles",
    "FillTiles",
    "FitCanvas",
    "FitPatches",
    "FitTiles",
    "Normalize",
    "PadToMultiple",
    "PadToSquare",
    "Patchify",
    "Resample",
    "Rescale",
    "Resize",
    "ResizeLongestEdge",
    "ResizeShortestEdge",
    "ResizeToMultiple",
    "ResizeToPixels",
    "ResizeToSide",
    "ResizeWithin",
    "SelectResolution",
    "SelectTiles",
    "ShrinkInto",
    "SplitLarge",
    "SplitTiles",
    "Transform",
    "WholeBefore",
]

MOST_PIXELS = 178_956_970  # of an image at any time; Pillow refuses larger files, too

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class ResizeLongestEdge:
    """Scale so that the longer side is `longest_edge` px, keeping the aspect ratio; the shorter side is truncated to an
    integer and then made even. A side over `limit` px is scaled down to it (again truncating)."""

    longest_edge: int
    resample: Resample
    limit: int
    op: Literal["resize_longest_edge"] = "resize_longest_edge"


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Scale so that the shorter side is `shortest_edge` px, keeping the aspect ratio; the longer side is truncated to
    an integer."""

    shortest_edge: int
    resample: Resample
    op: Literal["resize_shortest_edge"] = "resize_shortest_edge"


@dataclass(frozen=True)
class ResizeToSide:
    """Scale so that the longer side is `side` px, keeping the aspect ratio; the shorter side (the height, of a
    square) is rounded to an integer (halves to the even one; or `truncated`), `least` px at least."""

    side: int
    least: int
    resample: Resample
    truncated: bool = False
    op: Literal["resize_to_side"] = "resize_to_side"


@dataclass(frozen=True)
class ResizeToMultiple:
    """Stretch so that both sides are multiples of `multiple` px: the longer side is rounded up first, the other follows
    the aspect ratio (truncated) and is rounded up too."""

    multiple: int
    resample: Resample
    op: Literal["resize_to_multiple"] = "resize_to_multiple"


@dataclass(frozen=True)
class ResizeWithin:
    """Stretch so that both sides are multiples of `multiple` px, each rounded up, after an image with a side over
    `longest_edge` px was scaled down to that, keeping the aspect ratio (truncated)."""

    multiple: int
    longest_edge: int
    resample: Resample
    op: Literal["resize_within"] = "resize_within"


@dataclass(frozen=True)
class ShrinkInto:
    """Scale an image that is higher than `height` or wider than `width` px down to both, keeping the aspect ratio
    (truncated); others stay as they are."""

    height: int
    width: int
    resample: Resample
    op: Literal["shrink_into"] = "shrink_into"


@dataclass(frozen=True)
class Resize:
    """Stretch to exactly `height` × `width` px."""

    height: int
    width: int
    resample: Resample
    op: Literal["resize"] = "resize"


@dataclass(frozen=True)
class CenterCrop:
    """Cut `height` × `width` px out of the middle, odd rests one px more at the bottom and right; an image that is
    smaller is put in the middle of black, odd rests one px more at the top and left."""

    height: int
    width: int
    op: Literal["center_crop"] = "center_crop"


@dataclass(frozen=True)
class PadToSquare:
    """Put the image in the middle of a square of its longer side, filled with `color` (0 to 255 per channel)."""

    color: tuple[int, ...]
    op: Literal["pad_to_square"] = "pad_to_square"


@dataclass(frozen=True)
class PadToMultiple:
    """Fill up with `color` (0 to 255 per channel) at the bottom and right, until both sides are multiples of `multiple`
    px."""

    multiple: int
    color: tuple[int, ...]
    op: Literal["pad_to_multiple"] = "pad_to_multiple"


@dataclass(frozen=True)
class SplitTiles:
    """Cut into `size` × `size` px tiles, row by row, then append the whole image stretched to one tile, the overview.
    An image that is one tile already stays as it is."""

    size: int
    resample: Resample
    op: Literal["split_tiles"] = "split_tiles"


@dataclass(frozen=True)
class SelectTiles:
    """Stretch to the grid of `size` × `size` px tiles whose aspect ratio is nearest to the image's, cut it row by row,
    and with `overview` append the whole image stretched to one tile, unless it is one tile alone.

    Grids have `min_tiles` to `max_tiles` tiles, `max_side` along a side at most (None: any). Of grids at the same
    distance the last one wins, in the order of their tiles and then columns, that has fewer pixels than twice the
    image's (or is the first of them).
    """

    size: int
    min_tiles: int
    max_tiles: int
    overview: bool
    resample: Resample
    max_side: int | None = None
    op: Literal["select_tiles"] = "select_tiles"


@dataclass(frozen=True)
class CoverTiles:
    """Stretch to the smallest grid of at most `max_tiles` tiles of `size` × `size` px that shows more than `covered` of
    the image, each of its parts scaled into a tile where it is larger; of several the one that shows most, and where
    none does, the one that shows most of all. Cut it row by row. Before the tiles stands the whole image stretched to
    one tile, the overview, unless it is one tile alone.

    Of a grid it is the parts of the turned one that count, rows for columns, as in transformers 5.24: a wide image
    becomes a high one.
    """

    size: int
    max_tiles: int
    covered: float
    resample: Resample
    op: Literal["cover_tiles"] = "cover_tiles"


@dataclass(frozen=True)
class FillTiles:
    """Stretch to a grid of at most `max_tiles` tiles of `size` × `size` px and cut it row by row. Before the tiles
    stands the whole image stretched to one tile, the overview, also where there is one tile alone.

    Of the grids that are no smaller than the image on either side, it is the one on which the image's shorter side
    would be longest with its aspect ratio kept (in whole px). Of several: of the aspect ratio whose largest grid has
    the fewest tiles, then the most columns; and the smallest of these. Where the image is larger than every grid, it is
    the largest of the nearest aspect ratio: of a high image the next one above its own, of others not above it.
    """

    size: int
    max_tiles: int
    resample: Resample
    op: Literal["fill_tiles"] = "fill_tiles"


@dataclass(frozen=True)
class SelectResolution:
    """Fit into the one of `resolutions` (height, width) that keeps most of the image's pixels (of several, the one that
    wastes least), keeping the aspect ratio, in the middle of black; cut it into `size` × `size` px tiles, row by row.
    Before them stands the whole image stretched to one tile, the overview."""

    resolutions: tuple[tuple[int, int], ...]
    size: int
    resample: Resample
    op: Literal["select_resolution"] = "select_resolution"


@dataclass(frozen=True)
class FitCanvas:
    """Scale into the top left of a black canvas of at most `max_tiles` tiles of `size` × `size` px, keeping the aspect
    ratio, and cut that row by row. The canvas is the one that enlarges the image least; where all shrink it, the one
    that shrinks it least; of several, the one with the fewest tiles (then rows). On it the image is as large as it is,
    but no larger than the canvas, and no smaller than a tile on the side that decides."""

    size: int
    max_tiles: int
    resample: Resample
    op: Literal["fit_canvas"] = "fit_canvas"


@dataclass(frozen=True)
class FitTiles:
    """Scale into the top left of white tiles of `size` × `size` px, keeping the aspect ratio (truncated), and cut these
    row by row. They are as many as the image's height and width have such tiles, begun ones included; where that is
    more than `max_tiles`, those of SelectTiles' grid of up to so many. An image whose shorter side would become less
    than `least` px is refused."""

    size: int
    max_tiles: int
    least: int
    resample: Resample
    op: Literal["fit_tiles"] = "fit_tiles"


@dataclass(frozen=True)
class FitPatches:
    """With `quarters`, cut into four quarters, row by row, odd rests in the later ones, and append the whole image.
    Scale each so that its longer side is `longest` px at most, keeping the aspect ratio (truncated), then stretch sides
    that are shorter than `shortest` px to that; leave out what is no whole patch of `patch` px at the bottom and right.
    Every one keeps its own size."""

    shortest: int
    longest: int
    patch: int
    quarters: bool
    resample: Resample
    op: Literal["fit_patches"] = "fit_patches"


@dataclass(frozen=True)
class Rescale:
    """uint8 → float32, multiplied by `factor`."""

    factor: float
    op: Literal["rescale"] = "rescale"


@dataclass(frozen=True)
class Normalize:
    """(x − mean) / std per channel, float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    op: Literal["normalize"] = "normalize"


@dataclass(frozen=True)
class WholeBefore:
    """Before the tiles stand all of them as one, the overview: their values, brought to one tile's size bicubically (a
    = −0.75, what is beyond an edge is as the edge), and nothing is averaged. The last of the transforms."""

    op: Literal["whole_before"] = "whole_before"


@dataclass(frozen=True)
class ResizeToPixels:
    """Stretch so that both sides are multiples of `multiple` px and height · width is between `min_pixels` and
    `max_pixels`, near the aspect ratio: each side is rounded to the nearest multiple (halves to the even one); where
    that makes the area too large or too small, the sides are scaled to the bound and rounded down or up instead. Where
    frames of a video share these bounds, it is that of all of them.

    One side may be `max_ratio` times the other at most. `whole`: an image with a side shorter than `multiple` is first
    taken for one that is as much larger as it needs to be, its sides truncated.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    resample: Resample
    max_ratio: float
    whole: bool = False
    op: Literal["resize_to_pixels"] = "resize_to_pixels"


@dataclass(frozen=True)
class SplitLarge:
    """Stretch to whole cells of `cell` × `cell` px, `min_cells` to `max_cells` of them, near the aspect ratio: as
    ResizeToPixels does, but a side is one cell at least. An image that takes more all the same is refused.

    Where the sides, rounded to cells (but to `thinnest` px at least), have an area of more than `large` times
    `max_cells`, the image is stretched to a grid of `size` × `size` px tiles instead, as SelectTiles chooses it, and
    cut; with `overview`, the image stretched to cells stands behind the tiles, in its own size. `max_tiles` 1: no image
    is cut.
    """

    cell: int
    min_cells: int
    max_cells: int
    large: float
    thinnest: int
    size: int
    min_tiles: int
    max_tiles: int
    overview: bool
    resample: Resample
    op: Literal["split_large"] = "split_large"


@dataclass(frozen=True)
class Patchify:
    """Cut into square patches of `patch` px and gather them in cells of `merge` × `merge` neighbours, cell by cell, row
    by row; the grid is that of the cells. The last of the transforms. Tiles become a grid each, one behind the other.

    A patch is [channels, frames, patch, patch], flattened: one place in `frames` equal frames of a video.
    """

    patch: int
    merge: int
    frames: int
    op: Literal["patchify"] = "patchify"


Transform = (
    ResizeLongestEdge
    | ResizeShortestEdge
    | ResizeToSide
    | ResizeWithin
    | ResizeToMultiple
    | ShrinkInto
    | Resize
    | CenterCrop
    | PadToSquare
    | PadToMultiple
    | SplitTiles
    | SelectTiles
    | CoverTiles
    | FillTiles
    | SelectResolution
    | FitCanvas
    | FitPatches
    | FitTiles
    | WholeBefore
    | Rescale
    | Normalize
    | ResizeToPixels
    | SplitLarge
    | Patchify
)
