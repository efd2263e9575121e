"""What becomes of an image: transforms of its pixels, and its place in the prompt."""

from dataclasses import dataclass
from typing import Literal

from mllm_edge.spec.frames import FrameSampling
from mllm_edge.spec.transforms import Patchify, Transform

__all__ = [
    "PIXELS",
    "AspectRatioId",
    "GridMerge",
    "GridRope",
    "GridWindows",
    "ImagePrompt",
    "ImageSpec",
    "ImageTokens",
    "LearnedPositions",
    "Pack",
    "RowEnd",
    "Shrink",
    "ShownPatches",
    "StageText",
    "Table",
    "Trim",
    "Unpad",
    "VideoSpec",
    "View",
    "WholeLast",
]

PIXELS = "pixel_values"  # the input that every image becomes


@dataclass(frozen=True)
class ImagePrompt:
    """How one image becomes text before tokenization. In the templates `{image}` stands for a placeholder per feature,
    `{row}` and `{col}` for 1-based coordinates of a tile or cell, `{number}` for its number among them, in `single`
    `{rows}` and `{cols}` for how many cells there are of an image that is left whole.

    An image that is one tile, or whose features are packed, becomes `single`; one of several becomes `begin`, then, row
    by row, `tile` for each followed by `row_end`, and at the end `overview`; where the overview is the first, `begin`
    has its `{image}`. `beside` stands between the tiles of a row, `between` between rows, and between those of features
    of an image of cells. `inline`: what a chat template for plain text gets in a message for an image, `{image}` being
    one placeholder. `reserved`: further words that stand for pictures or videos, which no text of a user's may become.
    `placeholder`: what stands for an image in a rendered text before it becomes all this, where that is not the `token`
    of its features. `border`: a word around images; it stands once where it would twice. With `blank`, a blank is put
    between it and a text behind it that begins with none (and with no "<"); without, blanks beside it fall away.
    """

    token: str
    token_id: int
    single: str
    tile: str = ""
    row_end: str = ""
    overview: str = ""
    begin: str = ""
    beside: str = ""
    between: str = ""
    inline: str = "{image}"
    reserved: tuple[str, ...] = ()
    placeholder: str = ""
    border: str = ""
    blank: bool = True

    @property
    def written(self) -> str:
        """What stands for an image in a rendered text."""
        return self.placeholder or self.token


# ---------------------------------------------------------------- what follows an image's grid
@dataclass(frozen=True)
class GridRope:
    """Inputs `names` (cos and sin) [cells, merge², dim/2] float32: in each patch the first half of the pairs is turned
    by its row in the image, the second by its column, both from theta^0 to theta^(4/dim − 1); with `alternate`, they
    take turns from theta^0 to theta^(2/dim − 1)."""

    theta: float
    dim: int
    names: tuple[str, ...] = ("cos", "sin")
    alternate: bool = False
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
    and a smaller one averages; with `corners` they have the same corner patches, and nothing is averaged. `cubic`: they
    have the same edges, bicubically (a = −0.75, what is beyond an edge is as the edge), and nothing is averaged. With
    `bounds` each patch has the one that was learned for where it begins as a part of the side: `bounds` are where the
    second and later ones begin."""

    file: str
    side: int
    dim: int
    corners: bool = False
    cubic: bool = False
    bounds: tuple[float, ...] | None = None
    names: tuple[str, ...] = ("position_embeds",)
    op: Literal["learned_positions"] = "learned_positions"


@dataclass(frozen=True)
class AspectRatioId:
    """Input `names` [1] int64: the grid's place, from 1, among all those of at most `max_tiles` tiles, by their rows
    and then columns."""

    max_tiles: int
    names: tuple[str, ...] = ("aspect_ratio_id",)
    op: Literal["aspect_ratio_id"] = "aspect_ratio_id"


@dataclass(frozen=True)
class GridMerge:
    """Input `names` [merged, side²] int64: the places of the side × side neighbouring cells that become one feature,
    row by row; rows and columns that are left over at the image's bottom and right become none."""

    side: int
    names: tuple[str, ...] = ("merged_cells",)
    op: Literal["grid_merge"] = "grid_merge"


Table = GridRope | GridWindows | LearnedPositions | AspectRatioId | GridMerge


# ---------------------------------------------------------------- from features to tokens
_TIMES = ("duration", "clock", "second", "seconds")


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


@dataclass(frozen=True)
class Trim:
    """Leave out the rows and columns of features that show nothing of the image, at the bottom and right of FitTiles'
    tiles; a feature is made of `side` × `side` patches, and shows something where its first one does."""

    side: int
    op: Literal["trim"] = "trim"


@dataclass(frozen=True)
class WholeLast:
    """The overview's features come behind the others and not before them, their rows end as theirs do, and between the
    two stands one more feature: row 0 of the bundle's array `file`."""

    file: str
    op: Literal["whole_last"] = "whole_last"


Pack = Unpad | Shrink | RowEnd | Trim | WholeLast


@dataclass(frozen=True)
class VideoSpec:
    """From the frames of a video to tokens. `transforms` make one slice of each frame. Where they end in Patchify they
    make one grid of cells of as many frames as a patch has, the last frame again where there are too few; these are a
    frame of the text. `together`: bounds on pixels are of all frames, whose number is taken for a multiple of the
    patch's (halves to the even one); fewer than that are refused.

    `token`, `token_id`: the placeholder of a feature. `placeholder`: what stands for a video in a rendered text, where
    that is not the `token`; it is another than an image's. A video becomes `begin`, then `frame` for each frame,
    `between` between them, then `close`. In these `{image}` stands for a placeholder per feature, `{number}` for the
    frame's, from 1, `{count}` for how many there are, in words; and, from the times that a caller gives with the
    frames, `{duration}` for the video's (H:MM:SS), `{clock}` for the frame's (MM:SS), `{second}` for that in whole
    seconds, `{seconds}` for the mean of its first's and last's, to a tenth.

    `features`: a frame's; each is a token. None: as many as a tile's of images, a square, which is brought to half the
    side (rounded up), bilinearly; behind those of the last frame stands row 0 of the bundle's array `end`.

    `rate`: where positions follow grids, and nothing stands between frames, how many positions a second takes on the
    first axis (truncated); None: a frame takes one. `sampling`: which frames of a recording the model's own processor
    takes; None: it does not say."""

    transforms: tuple[Transform, ...]
    token: str
    token_id: int
    end: str = ""
    features: int | None = None
    placeholder: str = ""
    begin: str = ""
    frame: str = "{image}"
    between: str = ""
    close: str = ""
    together: bool = False
    rate: float | None = None
    sampling: FrameSampling | None = None

    @property
    def written(self) -> str:
        """What stands for a video in a rendered text."""
        return self.placeholder or self.token

    @property
    def patches(self) -> Patchify | None:
        """How a frame becomes cells; None where it becomes a tile."""
        last = self.transforms[-1] if self.transforms else None
        return last if isinstance(last, Patchify) else None

    @property
    def timed(self) -> bool:
        """Whether a prompt needs the times of the frames."""
        text = self.begin + self.frame
        return self.rate is not None or any(f"{{{word}}}" in text for word in _TIMES)


@dataclass(frozen=True)
class ImageTokens:
    """Tokens `ids` that have the rows of the bundle's array `file`, in their order, in place of their embeddings where
    a prompt has images."""

    ids: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class View:
    """What else is made of an image that is one slice: an input `name` [images, channels, height, width] float32 of the
    components, beside `pixel_values`."""

    name: str
    transforms: tuple[Transform, ...]
    height: int
    width: int


@dataclass(frozen=True)
class ShownPatches:
    """Inputs `names` of the components beside each of FitTiles' tiles of patches of `patch` px: `places` [tiles,
    patches] int64, the learned position of each, of `side` × `side`, as LearnedPositions chooses it by `bounds` among
    those of the tile that show something of the image, and 0 for the others; and `bias` [tiles, 1, 1, patches] float32,
    which hides these. The overview shows the image everywhere."""

    patch: int
    side: int
    bounds: tuple[float, ...]
    names: tuple[str, ...] = ("patch_places", "patch_bias")


@dataclass(frozen=True)
class StageText:
    """The prompt's text beside each slice: an input `name` [slices, tokens] int64 of the components, of at most `most`
    tokens of the bundle's tokenizer `file`. Images' placeholders and the words `without` are left out of it."""

    name: str
    file: str
    most: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSpec:
    """From an RGB image to `pixel_values` float32, to prompt text, and from its features to tokens.

    An image becomes slices: tiles of one size, `pixel_values` [tiles, channels, height, width], or, where the last
    transform is Patchify, cells of patches, [cells, merge², channels · frames · patch²], as many as the image's size
    asks for; `height` and `width` are then a cell's. With `whole`, an image is one slice of its own size, cells of
    `height` × `width` px, each of which makes `features`; images of one prompt are filled up with zeros at the bottom
    and right to a size that all fit into, and what is made of these is left out. The connector makes `features` rows of
    each slice, or, with `resampled`, of each grid of cells. `tables`: further inputs of the components, made of an
    image's grid, or of each of its grids where tiles become cells; `views`: made of its pixels; `shown`: of where these
    stand in its tiles; `text`: of the prompt's text.

    `pack`: where it is not empty, the features of an image's tiles are a grid of rows, square in each tile, which it
    changes in its order; the overview's come before them, untouched. Rows of an image that is left whole may have ends.
    `several`: the transforms for a prompt with more than one image, where they differ. `video`: what becomes of videos,
    where the model takes them.

    `tiles`: an image has so many, and those that it lacks are zeros behind all transforms. `into`: where its features
    go. `tokens`: they take the places of its tokens. `cross_attention`: that looks at all features of all images, those
    of zeros too, from the image's token on until the next image's; of images one behind the other, at all of these.
    Such an image is one token, which keeps its embedding.

    `around`: tokens around images that have embeddings of their own. `both_ways`: which tokens see each other in both
    directions, beside what each sees of those before it: those of an `image`, or all of a `prompt`, with images or
    without. `most_images`: a prompt has no more (None: any number).
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
    shown: ShownPatches | None = None
    text: StageText | None = None
    resampled: bool = False
    both_ways: Literal["image", "prompt"] | None = None
    around: ImageTokens | None = None
    most_images: int | None = None
    whole: bool = False

    @property
    def patches(self) -> Patchify | None:
        """How an image becomes cells; None where it becomes tiles."""
        last = self.transforms[-1] if self.transforms else None
        return last if isinstance(last, Patchify) else None

    @property
    def merged(self) -> int:
        """Cells along the side of what becomes one feature."""
        return next((table.side for table in self.tables if isinstance(table, GridMerge)), 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one slice's pixel values; of images that are left whole, of one cell."""
        patches = self.patches
        if patches is None:
            return (self.channels, self.height, self.width)
        return (patches.merge**2, self.channels * patches.frames * patches.patch**2)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one slice's inputs that are made of pixels or of their places, by name."""
        views = {view.name: (self.channels, view.height, view.width) for view in self.views}
        if self.shown is None:
            return {PIXELS: self.shape, **views}
        patches = (self.height // self.shown.patch) * (self.width // self.shown.patch)
        places, bias = self.shown.names
        return {PIXELS: self.shape, **views, places: (patches,), bias: (1, 1, patches)}

    @property
    def seen_together(self) -> bool:
        """Whether an image is seen otherwise beside others than alone."""
        return self.several is not None or self.whole

    def transforms_for(self, images: int) -> tuple[Transform, ...]:
        """Those of each image of a prompt with so many."""
        return self.transforms if self.several is None or images < 2 else self.several

    @property
    def arrays(self) -> tuple[str, ...]:
        """The bundle's arrays that images need."""
        steps = tuple(step.file for step in self.pack if isinstance(step, (RowEnd, WholeLast)))
        ends = () if self.video is None or self.video.end in ("", *steps) else (self.video.end,)
        around = () if self.around is None else (self.around.file,)
        return steps + ends + around + tuple(table.file for table in self.tables if isinstance(table, LearnedPositions))
