"""What an image becomes, from its size alone: slices, runs, tokens, prompt text, positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.prompt.pack import Packed, packed
from mllm_edge.runtime.prompt.transforms.apply import cut_of
from mllm_edge.spec import ImagePrompt, ImageSpec

__all__ = ["Layout", "grid_positions", "image_text", "layout_of"]


@dataclass(frozen=True, eq=False)
class Layout:
    """An image's place in everything that follows.

    `slices`: rows of `pixel_values`, a grid of `rows` × `cols` and perhaps an overview, or tiles that it lacks.
    `tokens`: its tokens in the prompt, as many as `text` has placeholders. `pack`: which of the features they are,
    None: all in their order. `tiles`: how many pictures it is to the vision encoder, 1 where it is cut into cells.
    """

    rows: int
    cols: int
    slices: int
    tiles: int
    tokens: int
    text: str
    pack: Packed | None


def layout_of(image: ImageSpec, height: int, width: int, images: int = 1) -> Layout:
    """The layout of one of so many `images` of a prompt, `height` × `width` px (upright).

    Raises ImageError when the size cannot be processed.
    """
    cut = cut_of(height, width, image.transforms_for(images))
    pack = packed(image, height, width, cut) if image.pack else None
    crossed = image.into == "cross_attention"
    tokens = len(pack) if pack is not None else 1 if crossed else cut.slices * image.features
    whole = cut.slices == 1 or pack is not None or crossed
    text = _whole_text(image.prompt, tokens) if whole else image_text(image.prompt, cut.rows, cut.cols, image.features)
    tiles = cut.slices if image.patches is None else 1
    return Layout(cut.rows, cut.cols, image.tiles or cut.slices, tiles, tokens, text, pack)


def image_text(prompt: ImagePrompt, rows: int, cols: int, features: int) -> str:
    """The text that stands for an image of several slices."""
    tokens = prompt.token * features
    tile = prompt.tile.replace("{image}", tokens)
    parts = [prompt.begin]
    for row in range(1, rows + 1):
        of_row = tile.replace("{row}", str(row))
        parts += [of_row.replace("{col}", str(col)) for col in range(1, cols + 1)]
        parts.append(prompt.row_end)
    parts.append(prompt.overview.replace("{image}", tokens))
    return "".join(parts)


def grid_positions(tokens: int, starts: Sequence[int], layouts: Sequence[Layout]) -> np.ndarray:
    """Positions [3, tokens] int64 of a prompt in which images of these layouts begin at the places `starts`; see
    `PositionSpec.images`."""
    pieces, place, position = [], 0, 0
    for start, layout in zip(starts, layouts, strict=True):
        pieces.append(_text_positions(position, start - place))
        position += start - place
        pieces.append(position + np.indices((1, layout.rows, layout.cols)).reshape(3, -1))
        place, position = start + layout.tokens, position + max(layout.rows, layout.cols)
    pieces.append(_text_positions(position, tokens - place))
    return np.concatenate(pieces, axis=1)


def _text_positions(first: int, tokens: int) -> np.ndarray:
    """Consecutive positions, the same on all axes."""
    return np.tile(np.arange(first, first + tokens), (3, 1))


def _whole_text(prompt: ImagePrompt, tokens: int) -> str:
    return prompt.single.replace("{image}", prompt.token * tokens)
