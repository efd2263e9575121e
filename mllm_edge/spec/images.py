"""What becomes of an image: transforms of its pixels, and its place in the prompt."""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "MOST_PIXELS",
    "PIXELS",
    "AspectRatioId",
    "CenterCrop",
    "FitCanvas",
    "GridRope",
    "GridWindows",
    "ImagePrompt",
    "ImageSpec",
    "LearnedPositions",
    "Normalize",
    "Pack",
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
    "RowEnd",
    "SelectResolution",
    "SelectTiles",
    "Shrink",
    "SplitLarge",
    "SplitTiles",
    "Table",
    "Transform",
    "Unpad",
    "VideoSpec",
    "View",
]

MOST_PIXELS = 178_956_970  # of an image at any time; Pillow refuses larger files, too

PIXELS = "pixel_values"  # the input that every image becomes

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
    """Scale so that the longer side is `side` px, keeping the aspect ratio; the shorter side is rounded to an integer
    (halves to the even one), `least` px at least."""

    side: int
    least: int
    resample: Resample
    op: Literal["resize_to_side"] = "resize_to_side"


@dataclass(frozen=True)
class ResizeToMultiple:
    """Stretch so that both sides are multiples of `multiple` px: the longer side is rounded up first, the other follows
    the aspect ratio (truncated) and is rounded up too."""

    multiple: int
    resample: Resample
    op: Literal["resize_to_multiple"] = "resize_to_multiple"


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

    Grids have `min_tiles` to `max_tiles` tiles. Of grids at the same distance the last one wins, in the order of their
    tiles and then columns, that has fewer pixels than twice the image's (or is the first of them).
    """

    size: int
    min_tiles: int
    max_tiles: int
    overview: bool
    resample: Resample
    op: Literal["select_tiles"] = "select_tiles"


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
class ResizeToPixels:
    """Stretch so that both sides are multiples of `multiple` px and height · width is between `min_pixels` and
    `max_pixels`, near the aspect ratio: each side is rounded to the nearest multiple (halves to the even one); where
    that makes the area too large or too small, the sides are scaled to the bound and rounded down or up instead.

    One side may be `max_ratio` times the other at most.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    resample: Resample
    max_ratio: float
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
    | ResizeToMultiple
    | Resize
    | CenterCrop
    | PadToSquare
    | SplitTiles
    | SelectTiles
    | SelectResolution
    | FitCanvas
    | Rescale
    | Normalize
    | ResizeToPixels
    | SplitLarge
    | Patchify
)


@dataclass(frozen=True)
class ImagePrompt:
    """How one image becomes text before tokenization. In the templates `{image}` stands for a placeholder per feature,
    `{row}` and `{col}` for 1-based coordinates of a tile or cell.

    An image that is one tile, or whose features are packed, becomes `single`; one of several becomes `begin`, then, row
    by row, `tile` for each followed by `row_end`, and at the end `overview`. `inline`: what a chat template for plain
    text gets in a message for an image, `{image}` being one placeholder. `reserved`: further words that stand for
    pictures or videos, which no text of a user's may become. `placeholder`: what stands for an image in a rendered text
    before it becomes all this, where that is not the `token` of its features.
    """

    token: str
    token_id: int
    single: str
    tile: str = ""
    row_end: str = ""
    overview: str = ""
    begin: str = ""
    inline: str = "{image}"
    reserved: tuple[str, ...] = ()
    placeholder: str = ""

    @property
    def written(self) -> str:
        """What stands for an image in a rendered text."""
        return self.placeholder or self.token


# ---------------------------------------------------------------- what follows an image's grid
@dataclass(frozen=True)
class GridRope:
    """Inputs `names` (cos and sin) [cells, merge², dim/2] float32: in each patch the first half of the pairs is turned
    by its row in the image, the second by its column, both from theta^0 to theta^(4/dim − 1)."""

    theta: float
    dim: int
    names: tuple[str, ...] = ("cos", "sin")
    op: Literal["grid_rope"] = "grid_rope"


@dataclass(frozen=True)
class GridWindows:
    """Windows of `side` × `side` cells, row by row, cut off at the image's right and bottom; inputs `names`: which cell
    stands where in each window [windows, side²] int64, a bias that hides what pads a window [windows, 1, side² ·
    merge², side² · merge²] float32, and where each cell stands in all windows [cells] int64."""

    side: int
    names: tuple[str, ...] = ("window_index", "window_bias", "cell_index")
    op: Literal["grid_windows"] = "grid_windows"


@dataclass(frozen=True)
class LearnedPositions:
    """An input [cells, merge², dim] float32: the bundle's array `file` [side², dim], which holds what was learned for
    side × side patches row by row, brought to the image's grid of patches, bilinearly. Both grids have the same edges,
    and a smaller one averages; with `corners` they have the same corner patches, and nothing is averaged."""

    file: str
    side: int
    dim: int
    corners: bool = False
    names: tuple[str, ...] = ("position_embeds",)
    op: Literal["learned_positions"] = "learned_positions"


@dataclass(frozen=True)
class AspectRatioId:
    """Input `names` [1] int64: the grid's place, from 1, among all those of at most `max_tiles` tiles, by their rows
    and then columns."""

    max_tiles: int
    names: tuple[str, ...] = ("aspect_ratio_id",)
    op: Literal["aspect_ratio_id"] = "aspect_ratio_id"


Table = GridRope | GridWindows | LearnedPositions | AspectRatioId


# ---------------------------------------------------------------- from features to tokens
@dataclass(frozen=True)
class Unpad:
    """Leave out the rows or columns of features that show only what SelectResolution padded."""

    op: Literal["unpad"] = "unpad"


@dataclass(frozen=True)
class Shrink:
    """Where the grid of features is more than `most` tiles' worth by a factor above 1.1² in area, bring it to that
    worth, bilinearly, keeping the aspect ratio (truncated)."""

    most: int
    op: Literal["shrink"] = "shrink"


@dataclass(frozen=True)
class RowEnd:
    """One more feature at the end of each row, or of an image of one tile: row 0 of the bundle's array `file`."""

    file: str
    op: Literal["row_end"] = "row_end"


Pack = Unpad | Shrink | RowEnd


@dataclass(frozen=True)
class VideoSpec:
    """From the frames of a video to tokens. `transforms` make one tile of each. `token`, `token_id`: the placeholder.

    `features`: a frame's, where stages of their own show videos; each is a token. None: as many as a tile's of images,
    a square, which is brought to half the side (rounded up), bilinearly; behind those of the last frame stands row 0 of
    the bundle's array `end`."""

    transforms: tuple[Transform, ...]
    token: str
    token_id: int
    end: str = ""
    features: int | None = None


@dataclass(frozen=True)
class View:
    """What else is made of an image that is one slice: an input `name` [images, channels, height, width] float32 of the
    components, beside `pixel_values`."""

    name: str
    transforms: tuple[Transform, ...]
    height: int
    width: int


@dataclass(frozen=True)
class ImageSpec:
    """From an RGB image to `pixel_values` float32, to prompt text, and from its features to tokens.

    An image becomes slices: tiles of one size, `pixel_values` [tiles, channels, height, width], or, where the last
    transform is Patchify, cells of patches, [cells, merge², channels · frames · patch²], as many as the image's size
    asks for; `height` and `width` are then a cell's. The connector makes `features` rows of each slice. `tables`:
    further inputs of the components, made of an image's grid, or of each of its grids where tiles become cells;
    `views`: made of its pixels.

    `pack`: where it is not empty, the features of an image's tiles are a grid of rows, square in each tile, which it
    changes in its order; the overview's come before them, untouched. `several`: the transforms for a prompt with more
    than one image, where they differ. `video`: what becomes of videos, where the model takes them.

    `tiles`: an image has so many, and those that it lacks are zeros behind all transforms. `into`: where its features
    go. `tokens`: they take the places of its tokens. `cross_attention`: that looks at all features of all images, those
    of zeros too, from the image's token on until the next image's; of images one behind the other, at all of these.
    Such an image is one token, which keeps its embedding.

    `both_ways`: which tokens see each other in both directions, beside what each sees of those before it: those of an
    `image`, or all of a `prompt`, with images or without.
    """

    transforms: tuple[Transform, ...]
    prompt: ImagePrompt
    height: int
    width: int
    features: int
    channels: int = 3
    tables: tuple[Table, ...] = ()
    pack: tuple[Pack, ...] = ()
    several: tuple[Transform, ...] | None = None
    tiles: int | None = None
    into: Literal["tokens", "cross_attention"] = "tokens"
    video: VideoSpec | None = None
    views: tuple[View, ...] = ()
    both_ways: Literal["image", "prompt"] | None = None

    @property
    def patches(self) -> Patchify | None:
        """How an image becomes cells; None where it becomes tiles."""
        last = self.transforms[-1] if self.transforms else None
        return last if isinstance(last, Patchify) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one slice's pixel values."""
        patches = self.patches
        if patches is None:
            return (self.channels, self.height, self.width)
        return (patches.merge**2, self.channels * patches.frames * patches.patch**2)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one slice's inputs that are made of pixels, by name."""
        return {PIXELS: self.shape, **{view.name: (self.channels, view.height, view.width) for view in self.views}}

    def transforms_for(self, images: int) -> tuple[Transform, ...]:
        """Those of each image of a prompt with so many."""
        return self.transforms if self.several is None or images < 2 else self.several

    @property
    def arrays(self) -> tuple[str, ...]:
        """The bundle's arrays that images need."""
        steps = tuple(step.file for step in self.pack if isinstance(step, RowEnd))
        ends = () if self.video is None or self.video.end in ("", *steps) else (self.video.end,)
        return steps + ends + tuple(table.file for table in self.tables if isinstance(table, LearnedPositions))
