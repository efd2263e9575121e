"""What a bundle says about its model, as frozen dataclasses (their JSON form: `json_form.py`).

This is the closed vocabulary of the device side. Nothing here knows a model family; a word that is not here means
that the bundle was made by a newer version. Only numpy-free standard library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CacheSpec",
    "CenterCrop",
    "Component",
    "EmbeddingSpec",
    "FileEntry",
    "GenerationDefaults",
    "GenerationSpec",
    "GridRope",
    "ImagePrompt",
    "ImageSpec",
    "Manifest",
    "ModelSpec",
    "Normalize",
    "PadToSquare",
    "Patchify",
    "PositionSpec",
    "Resample",
    "Rescale",
    "Resize",
    "ResizeLongestEdge",
    "ResizeShortestEdge",
    "ResizeToMultiple",
    "ResizeToPixels",
    "RopeSpec",
    "SCHEMA_VERSION",
    "SelectTiles",
    "SplitTiles",
    "TensorSpec",
    "Transform",
    "Variant",
]

SCHEMA_VERSION = 1

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


# ---------------------------------------------------------------- image transforms
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
    """Cut into `size` × `size` px tiles, row by row, then append the whole image stretched to one tile. An image that
    is one tile already stays as it is, and its grid is (0, 0)."""

    size: int
    resample: Resample
    op: Literal["split_tiles"] = "split_tiles"


@dataclass(frozen=True)
class SelectTiles:
    """Stretch to the grid of `size` × `size` px tiles whose aspect ratio is nearest to the image's, cut it row by row,
    and with `overview` append the whole image stretched to one tile. One tile alone has the grid (0, 0).

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
class Patchify:
    """Cut into square patches of `patch` px and gather them in cells of `merge` × `merge` neighbours, cell by cell, row
    by row; the grid is that of the cells. The last of the transforms.

    A patch is [channels, frames, patch, patch], flattened: one place in `frames` equal frames of a film.
    """

    patch: int
    merge: int
    frames: int
    op: Literal["patchify"] = "patchify"


Transform = (
    ResizeLongestEdge
    | ResizeShortestEdge
    | ResizeToMultiple
    | Resize
    | CenterCrop
    | PadToSquare
    | SplitTiles
    | SelectTiles
    | Rescale
    | Normalize
    | ResizeToPixels
    | Patchify
)


# ---------------------------------------------------------------- model
@dataclass(frozen=True)
class ImagePrompt:
    """How one image becomes text before tokenization. In the templates `{image}` stands for `tokens_per_tile`
    placeholder tokens, `{row}` and `{col}` for 1-based tile coordinates. (Cells of patches count as tiles.)

    An image with grid (0, 0) becomes `single`; with grid (R, C) it becomes `begin`, then, row by row, C times `tile`
    followed by `row_end`, and at the end `overview`. `inline`: what a chat template for plain text gets in a message
    for an image, `{image}` being one placeholder. `reserved`: further words that stand for pictures or films, which no
    text of a user's may become.
    """

    token: str
    token_id: int
    tokens_per_tile: int
    single: str
    tile: str = ""
    row_end: str = ""
    overview: str = ""
    begin: str = ""
    inline: str = "{image}"
    reserved: tuple[str, ...] = ()


@dataclass(frozen=True)
class GridRope:
    """The vision encoder's inputs `cos` and `sin` [cells, merge², dim/2] float32: in each patch the first half of the
    pairs is turned by its row in the image, the second by its column, both from theta^0 to theta^(4/dim − 1)."""

    theta: float
    dim: int
    op: Literal["grid_rope"] = "grid_rope"


@dataclass(frozen=True)
class ImageSpec:
    """From an RGB image to `pixel_values` float32, and to prompt text.

    An image is tiles of one size, `pixel_values` [tiles, channels, height, width]; the vision encoder takes any number
    of them. Where the last transform is Patchify, it is a grid of cells instead, as many as the image's size asks for,
    [cells, merge², channels · frames · patch²]; the vision encoder then takes one image at a time, and what `tables`
    make of its grid. In the prompt a cell is a tile; `height` and `width` are its size in px.
    """

    transforms: tuple[Transform, ...]
    prompt: ImagePrompt
    height: int
    width: int
    channels: int = 3
    tables: tuple[GridRope, ...] = ()

    @property
    def cells(self) -> Patchify | None:
        """How an image becomes cells; None where it becomes tiles."""
        last = self.transforms[-1] if self.transforms else None
        return last if isinstance(last, Patchify) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one tile's or cell's pixel values."""
        cells = self.cells
        if cells is None:
            return (self.channels, self.height, self.width)
        return (cells.merge**2, self.channels * cells.frames * cells.patch**2)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first `dim` elements of a head, halves convention; the host computes cos and sin.

    `kind`:
    default   inverse frequencies theta^(−2i/dim)
    linear    all divided by `factor`
    dynamic   a theta that grows with the sequence beyond `original_max_positions` (`factor`)
    llama3    divided by wavelength, between `low_freq_factor` and `high_freq_factor` of `original_max_positions`
    yarn      divided by turns within `original_max_positions`, between `beta_fast` and `beta_slow` (`truncate`: the
              bounds are whole pairs)
    longrope  divided by `short_factors`, or by `long_factors` beyond `original_max_positions`; one factor per pair

    cos and sin are multiplied by `attention_factor`. With `sections` (M-RoPE) a position is (time, row, column):
    `sectioned` gives each axis that many consecutive pairs; `interleaved` takes every third pair for row and column,
    as many as their sections say, and time has the rest.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    layout: Literal["sectioned", "interleaved"] = "sectioned"

    @property
    def depends_on_length(self) -> bool:
        """Whether the rows of a position change as the sequence grows, so that no table made before stays right."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class PositionSpec:
    """How positions and order reach the decoder.

    `kind`:
    rope            `ropes` turn queries and keys; a layer's rope is one of them, its rows are the graph's inputs `cos`
                    and `sin`, or `cos.{k}` and `sin.{k}` for the second and later ones
    learned         a row of `table` [positions, hidden_size] is added to each embedding
    relative_bias   `table` [buckets, heads] scores the distance between query and key: half of the buckets are single
                    distances, the rest grow logarithmically up to `max_distance`
    none            no positions

    `windows`: how many of the latest positions a token sees, itself included (None: all before it); a layer's mask is
    the graph's input `attention_bias`, or `attention_bias.{k}`. `table` is a .npy file of the bundle.

    `images`: what the positions of an image's tokens follow.
    sequence        their places, like those of text
    grid            for ropes with sections: row r and column c of an image's grid, which begins at position p, are at
                    (p, p + r, p + c); what comes after the image goes on at p + the longer side of the grid
    """

    kind: Literal["rope", "learned", "relative_bias", "none"]
    ropes: tuple[RopeSpec, ...] = ()
    windows: tuple[int | None, ...] = (None,)
    table: str = ""
    max_distance: int = 0
    images: Literal["sequence", "grid"] = "sequence"


@dataclass(frozen=True)
class CacheSpec:
    """One kind of decoder state. `kv`: `past_key_values.N.key` and `.value` for N in range(layers), each
    [batch, heads, capacity, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    kind: Literal["kv"] = "kv"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token embeddings [rows, hidden_size] in a .npy file of `dtype`; a row is multiplied by `scale` when read."""

    file: str
    rows: int
    dtype: Literal["float16", "float32"] = "float16"
    scale: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """The model as the device needs to know it. `family` and `model_type` are for people only."""

    family: str
    model_type: str
    hidden_size: int
    vocab_size: int
    context_length: int
    parameters: int
    embedding: EmbeddingSpec
    positions: PositionSpec
    cache: CacheSpec
    image: ImageSpec | None


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's own generation settings ask for, named as in transformers' GenerationConfig. Applied where
    a call does not say otherwise; `top_k`, `top_p` and `min_p` only to drawn answers."""

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class GenerationSpec:
    """generation.json: stop ids, special tokens by name, and the checkpoint's own generation settings."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    add_special_tokens: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


# ---------------------------------------------------------------- bundle
@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a dimension is a number or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Variant:
    """One form of a component for one target. `minimum` maps a runtime's module name to its lowest version."""

    target: str
    dialect: Literal["contrib", "opset24", "opset17"]
    precision: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv_mode: Literal["in_place", "append"] | None = None
    minimum: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Component:
    """One step of the model and the forms it comes in."""

    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle, and the XXH3 of each block of `block` bytes: 16 hexadecimal
    digits each, one after the other. A bundle of an older version has no XXH3."""

    nbytes: int
    sha256: str
    block: int = 0
    xxh3: str = ""


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `parity` and `accuracy` hold what was measured; `provenance` where it came from.
    `checksum`: the file's own bytes, 12 digits, and its XXH3 with zeros in the place of both."""

    schema: int
    model: ModelSpec
    components: Mapping[str, Component]
    recipe: Mapping[str, Any]
    parity: Mapping[str, Any]
    accuracy: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    checksum: str = ""
