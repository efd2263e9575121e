"""What an image becomes, from its size alone: slices, runs, tokens, prompt text, positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mllm_edge.errors import ImageError, PromptError
from mllm_edge.runtime.prompt.pack import PackedFrames, PackedTiles, PackedWhole, packed, packed_frames
from mllm_edge.runtime.prompt.sources import Kind
from mllm_edge.runtime.prompt.timing import Timing, hours, in_words, written
from mllm_edge.runtime.prompt.transforms.apply import cut_of
from mllm_edge.spec import ImagePrompt, ImageSpec, VideoSpec

__all__ = ["Layout", "grid_positions", "image_text", "layout_of", "on_one_canvas", "shared_bounds", "video_layout"]


@dataclass(frozen=True, eq=False)
class Layout:
    """An image's place in everything that follows.

    `slices`: rows of `pixel_values`, a grid of `rows` × `cols` and perhaps an overview, or tiles that it lacks.
    `tokens`: its tokens in the prompt, as many as `text` has placeholders. `pack`: how features become tokens, None:
    each is one, in their order. `tiles`: how many pictures the vision encoder sees of it. `grids`: rows and columns of
    cells of each, where they are cut into cells; `rows` × `cols` is then the grid of cells of one alone, as of an image
    that is left whole, or of each frame, else that of the tiles. `kind`: what it is. `blocks`: of grids that follow
    each other in the prompt without anything between, the places of each on the first axis.
    """

    rows: int
    cols: int
    slices: int
    tiles: int
    tokens: int
    text: str
    pack: PackedTiles | PackedWhole | PackedFrames | None
    grids: tuple[tuple[int, int], ...] = ()
    kind: Kind = "image"
    blocks: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def features(self) -> int:
        """How many the stages make of it, where they take the places of tokens."""
        return self.tokens if self.pack is None else self.pack.features

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Slices, rows and columns of each run of a stage that takes an image."""
        return tuple((rows * cols, rows, cols) for rows, cols in self.grids) or ((self.slices, self.rows, self.cols),)


def layout_of(image: ImageSpec, height: int, width: int, images: int = 1) -> Layout:
    """The layout of one of so many `images` of a prompt, `height` × `width` px (upright).

    Raises ImageError when the size cannot be processed.
    """
    cut = cut_of(height, width, image.transforms_for(images))
    pack = packed(image, height, width, cut) if image.pack or image.whole else None
    if isinstance(pack, PackedWhole):
        text = image.prompt.single.replace("{rows}", str(pack.rows)).replace("{cols}", str(pack.cols))
        text = text.replace("{image}", image.prompt.token * len(pack))
        return Layout(pack.rows, pack.cols, 1, 1, len(pack), text, pack)
    crossed, grids = image.into == "cross_attention", _merged(image, cut.grids)
    tiles = [(1 if image.resampled else math.prod(grid)) * image.features for grid in grids]
    tiles = tiles or [image.features] * cut.slices
    tokens = len(pack) if pack is not None else 1 if crossed else sum(tiles)
    if len(grids) == 1 and image.prompt.between:
        text = image.prompt.single.replace("{image}", _rows(image.prompt, grids[0][0], tokens))
    elif len(tiles) == 1 or pack is not None or crossed:
        text = image.prompt.single.replace("{image}", image.prompt.token * tokens)
    else:
        text = image_text(image.prompt, cut.rows, cut.cols, tiles[0], tiles[-1])
    return Layout(cut.rows, cut.cols, image.tiles or cut.slices, len(tiles), tokens, text, pack, cut.grids)


def on_one_canvas(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Those of the images of a prompt: what is left whole lies on a canvas that all of these fit into."""
    packs = [layout.pack for layout in layouts if isinstance(layout.pack, PackedWhole)]
    if not packs:
        return tuple(layouts)
    canvas = max(pack.rows for pack in packs), max(pack.cols for pack in packs)
    return tuple(
        replace(layout, pack=replace(layout.pack, canvas=canvas)) if isinstance(layout.pack, PackedWhole) else layout
        for layout in layouts
    )


def _merged(image: ImageSpec, grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows and columns of features of grids of cells; raises ImageError for one that makes none."""
    found = [(rows // image.merged, cols // image.merged) for rows, cols in grids]
    if not all(map(math.prod, found)):
        raise ImageError(
            f"an image of {grids[0][0]}×{grids[0][1]} cells makes no features", "enlarge it, or crop it less narrowly"
        )
    return found


def _rows(prompt: ImagePrompt, rows: int, tokens: int) -> str:
    """So many placeholders in rows."""
    return prompt.between.join([prompt.token * (tokens // rows)] * rows)


def video_layout(image: ImageSpec, frames: int, height: int, width: int, timing: Timing | None = None) -> Layout:
    """The layout of a video of so many frames of `height` × `width` px (upright); errors as of `layout_of`, and
    PromptError for frames without times that the prompt needs."""
    video = image.video
    assert video is not None
    if video.timed and timing is None:
        fix = "say it: Video(frames, fps=2); of a size (frames, height, width, 2), or --fps 2"
        raise PromptError("this model reads when a video's frames were taken", fix)
    cut = cut_of(height, width, video.transforms, shared_bounds(video, frames))
    shown = -(-frames // video.patches.frames) if video.patches is not None else frames
    pack = packed_frames(image, video, frames) if video.features is None else None
    tokens = len(pack) if pack is not None else shown * cut.slices * (video.features or 0)
    text = _video_text(video, shown, tokens, timing)
    grids, size = ((cut.rows, cut.cols),) * shown if video.patches is not None else (), (cut.rows, cut.cols)
    return Layout(*size, shown * cut.slices, shown, tokens, text, pack, grids, "video", _blocks(video, shown, timing))


def shared_bounds(video: VideoSpec, frames: int) -> tuple[int, int]:
    """How many frames share bounds on pixels, and what their number is taken for; raises ImageError for too few."""
    if not video.together or video.patches is None:
        return 1, 1
    few = video.patches.frames
    if frames < few:
        raise ImageError(f"a video of {frames} frames", f"this model takes {few} or more: an image is not a video")
    return frames, round(frames / few) * few


def _blocks(video: VideoSpec, shown: int, timing: Timing | None) -> tuple[tuple[int, ...], ...]:
    """See `Layout.blocks`; frames apart are a block each."""
    if video.frame != "{image}" or video.between:
        return ((0,),) * shown
    if video.rate is None or timing is None or video.patches is None:
        return (tuple(range(shown)),)
    seconds = video.patches.frames / timing.rate if timing.rate else 1.0
    # In float32, as the reference has it: the truncation follows.
    step = np.float32(video.rate * seconds)
    return (tuple((np.arange(shown, dtype=np.float32) * step).astype(int).tolist()),)


def _video_text(video: VideoSpec, shown: int, tokens: int, timing: Timing | None) -> str:
    """The text that stands for a video of so many frames, or few of them that share cells, and tokens."""
    frames = video.patches.frames if video.patches is not None else 1
    times = timing.groups(frames) if timing is not None else ((0.0, 0.0),) * shown
    if video.frame == "{image}" and not video.between:
        body = video.token * tokens
    else:
        image = video.token * (tokens // shown)
        one = ({"image": image, "number": str(i), **written(*time)} for i, time in enumerate(times, 1))
        body = video.between.join(_filled(video.frame, words) for words in one)
    whole = {"count": in_words(shown), "duration": hours(timing.duration) if timing is not None else ""}
    return _filled(video.begin, whole) + body + video.close


def _filled(template: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        template = template.replace(f"{{{word}}}", value)
    return template


def image_text(prompt: ImagePrompt, rows: int, cols: int, features: int, of_overview: int) -> str:
    """The text that stands for an image of several tiles of so many features."""
    tile = prompt.tile.replace("{image}", prompt.token * features)
    begin, overview = (text.replace("{image}", prompt.token * of_overview) for text in (prompt.begin, prompt.overview))
    written = []
    for row in range(1, rows + 1):
        of_row = tile.replace("{row}", str(row))
        numbered = (of_row.replace("{number}", str((row - 1) * cols + col)) for col in range(1, cols + 1))
        tiles = (text.replace("{col}", str(col)) for col, text in enumerate(numbered, 1))
        written.append(prompt.beside.join(tiles) + prompt.row_end)
    return begin + prompt.between.join(written) + overview


def grid_positions(tokens: int, where: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray:
    """Positions [3, tokens] int64 of a prompt whose image tokens stand at the places `where` [N]; see
    `PositionSpec.images`. What follows a block begins behind the furthest of its positions on any axis."""
    pieces, place, position, taken = list[np.ndarray](), 0, 0, 0
    for layout in layouts:
        for steps in layout.blocks:
            start, grid = int(where[taken]), np.indices((len(steps), layout.rows, layout.cols)).reshape(3, -1)
            grid[0] = np.repeat(steps, layout.rows * layout.cols)
            pieces.append(_text_positions(position, start - place))
            position += start - place
            pieces.append(position + grid)
            place, position = start + grid.shape[1], position + int(grid.max()) + 1
            taken += grid.shape[1]
    pieces.append(_text_positions(position, tokens - place))
    return np.concatenate(pieces, axis=1)


def _text_positions(first: int, tokens: int) -> np.ndarray:
    """Consecutive positions, the same on all axes."""
    return np.tile(np.arange(first, first + tokens), (3, 1))
