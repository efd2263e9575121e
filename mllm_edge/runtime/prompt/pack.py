"""From features to tokens: those of an image's tiles are a grid that shrinks, and rows with an end; those of a whole
image lie on a canvas; those of a video's frames shrink, and end once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mllm_edge.errors import BundleError
from mllm_edge.runtime.prompt.shown_patches import shown_patches
from mllm_edge.runtime.prompt.transforms.cut import Cut
from mllm_edge.spec import ImageSpec, RowEnd, Shrink, Trim, Unpad, VideoSpec, WholeLast

__all__ = ["PackedFrames", "PackedTiles", "PackedWhole", "packed", "packed_frames"]

_WORTH_SHRINKING = 1.1  # by side; fixed in the models that do it


@dataclass(frozen=True)
class _Grid:
    """Which part of the tiles' features is left (a slice of rows, of columns), and the size it is brought to."""

    top: int
    left: int
    height: int
    width: int
    shrunk: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.shrunk or (self.height, self.width)


@dataclass(frozen=True)
class PackedTiles:
    """How an image's features become its tokens. `side`: features along a tile's side; the tiles are a grid of `rows` ×
    `cols` behind an overview, or one tile alone. `row_end`: the bundle's array whose row ends each row, "" for none;
    `before_whole`: that whose row stands before the overview where that comes last, "" where it comes first."""

    side: int
    rows: int
    cols: int
    grid: _Grid | None
    row_end: str
    before_whole: str = ""

    @property
    def features(self) -> int:
        """How many it is made of."""
        return self.side**2 * (1 if self.grid is None else 1 + self.rows * self.cols)

    def __len__(self) -> int:
        """The number of tokens."""
        if self.grid is None:
            return self.side**2 + bool(self.row_end)
        height, width = self.grid.size
        ended = height * (width + bool(self.row_end))
        whole = self.side * (self.side + bool(self.row_end)) + 1 if self.before_whole else self.side**2
        return whole + ended

    def apply(self, features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """features [slices · side², H] → [tokens, H] float32; `arrays`: the bundle's, by file, each [rows, H]."""
        end = [arrays[self.row_end][:1]] if self.row_end else []
        overview, hidden = features[: self.side**2], features.shape[1]
        if self.grid is None:
            return np.concatenate([overview, *end])
        tiles = features[self.side**2 :].reshape(self.rows, self.cols, self.side, self.side, hidden)
        whole = tiles.transpose(0, 2, 1, 3, 4).reshape(self.rows * self.side, self.cols * self.side, hidden)
        g = self.grid
        rows = whole[g.top : g.top + g.height, g.left : g.left + g.width]
        rows = _bilinear(rows, g.shrunk) if g.shrunk is not None else rows
        if not self.before_whole:
            return np.concatenate([overview, _ended(rows, end)])
        whole = overview.reshape(self.side, self.side, hidden)
        return np.concatenate([_ended(rows, end), arrays[self.before_whole][:1], _ended(whole, end)])


@dataclass(frozen=True)
class PackedWhole:
    """How the features of an image that is left whole become its tokens: the `rows` × `cols` at the top left of a
    `canvas`. `row_end` as in PackedTiles."""

    rows: int
    cols: int
    canvas: tuple[int, int]
    row_end: str

    @property
    def features(self) -> int:
        """How many it is made of."""
        return math.prod(self.canvas)

    def __len__(self) -> int:
        """The number of tokens."""
        return self.rows * (self.cols + bool(self.row_end))

    def apply(self, features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """features [canvas, H] → [tokens, H] float32; `arrays`: the bundle's, by file, each [rows, H]."""
        grid = features.reshape(*self.canvas, -1)[: self.rows, : self.cols]
        return _ended(grid, [arrays[self.row_end][:1]] if self.row_end else [])


@dataclass(frozen=True)
class PackedFrames:
    """How the features of a video's frames become its tokens. `side`: features along a frame's side; `pooled`: what
    that is brought to. `end`: the bundle's array whose row stands behind the last frame."""

    frames: int
    side: int
    pooled: int
    end: str

    @property
    def features(self) -> int:
        """How many it is made of."""
        return self.frames * self.side**2

    def __len__(self) -> int:
        """The number of tokens."""
        return self.frames * self.pooled**2 + 1

    def apply(self, features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """features [frames · side², H] → [tokens, H] float32; `arrays`: the bundle's, by file, each [rows, H]."""
        hidden = features.shape[1]
        frames, size = features.reshape(-1, self.side, self.side, hidden), (self.pooled, self.pooled)
        return np.concatenate([*(_bilinear(frame, size).reshape(-1, hidden) for frame in frames), arrays[self.end][:1]])


def _ended(rows: np.ndarray, end: list[np.ndarray]) -> np.ndarray:
    """rows [height, width, H], each with its `end` [1, H] → [tokens, H]."""
    ends = [np.broadcast_to(row, (len(rows), 1, rows.shape[2])) for row in end]
    return np.concatenate([rows, *ends], axis=1).reshape(-1, rows.shape[2])


def packed_frames(image: ImageSpec, video: VideoSpec, frames: int) -> PackedFrames:
    """How `frames` frames become tokens; raises BundleError for frames whose features are no square."""
    side = _side(image)
    return PackedFrames(frames, side, -(-side // 2), video.end)


def _side(image: ImageSpec) -> int:
    """Features along a side of a tile."""
    side = math.isqrt(image.features)
    if side * side != image.features:
        raise BundleError(f"{image.features} features of a tile are no square", "export the bundle again")
    return side


def packed(image: ImageSpec, height: int, width: int, cut: Cut) -> PackedTiles | PackedWhole:
    """What `image.pack` makes of an image of `height` × `width` px that was cut so; raises BundleError for tiles whose
    features are no square."""
    row_end = next((step.file for step in image.pack if isinstance(step, RowEnd)), "")
    if image.whole:
        rows, cols = cut.height // image.height, cut.width // image.width
        return PackedWhole(rows, cols, (rows, cols), row_end)
    side = _side(image)
    if cut.slices == 1:
        return PackedTiles(side, 1, 1, None, row_end)
    grid = _Grid(0, 0, cut.rows * side, cut.cols * side)
    for step in image.pack:
        if isinstance(step, Unpad):
            grid = _unpadded(grid, height, width)
        elif isinstance(step, Shrink):
            grid = _shrunk(grid, step.most * side**2)
        elif isinstance(step, Trim):
            rows, cols = shown_patches(cut, cut.height // (side * step.side))
            grid = _Grid(0, 0, -(-rows // step.side), -(-cols // step.side))
    last = next((step.file for step in image.pack if isinstance(step, WholeLast)), "")
    return PackedTiles(side, cut.rows, cut.cols, grid, row_end, last)


def _unpadded(grid: _Grid, height: int, width: int) -> _Grid:
    """Without what is beside an image of that aspect ratio in the middle; the padding is the same on both sides."""
    # The reference's arithmetic, step by step: a rounding decides between two sizes.
    if width / height > grid.width / grid.height:
        padding = (grid.height - int(round(height * (grid.width / width), 7))) // 2
        return _Grid(padding, 0, grid.height - 2 * padding, grid.width)
    padding = (grid.width - int(round(width * (grid.height / height), 7))) // 2
    return _Grid(0, padding, grid.height, grid.width - 2 * padding)


def _shrunk(grid: _Grid, most: int) -> _Grid:
    ratio = math.sqrt(grid.height * grid.width / most)
    if ratio <= _WORTH_SHRINKING:
        return grid
    return _Grid(grid.top, grid.left, grid.height, grid.width, (int(grid.height // ratio), int(grid.width // ratio)))


def _bilinear(rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """rows [height, width, H] brought to a size, as torch's `interpolate` does without antialiasing."""
    for axis, length in enumerate(size):
        rows = np.moveaxis(np.tensordot(_weights(rows.shape[axis], length), rows, (1, axis)), 0, axis)
    return rows


@lru_cache(64)
def _weights(before: int, after: int) -> np.ndarray:
    """[after, before] float32: each row has the shares of two neighbours, their centres half a pixel in."""
    places = np.maximum((np.arange(after, dtype=np.float32) + np.float32(0.5)) * np.float32(before / after) - 0.5, 0)
    first = places.astype(np.int64)
    share = (places - first).astype(np.float32)
    weights = np.zeros((after, before), np.float32)
    weights[np.arange(after), first] = 1 - share
    weights[np.arange(after), np.minimum(first + 1, before - 1)] += share
    return weights
