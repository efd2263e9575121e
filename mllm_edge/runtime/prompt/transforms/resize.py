"""Transforms that give an image another size."""

import math
from collections.abc import Mapping

from PIL import Image

from mllm_edge.errors import ImageError
from mllm_edge.runtime.prompt.transforms.cut import Cut, How
from mllm_edge.spec import (
    CenterCrop,
    PadToMultiple,
    PadToSquare,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    ResizeToMultiple,
    ResizeToPixels,
    ResizeToSide,
    ResizeWithin,
    ShrinkInto,
)

__all__ = ["RESIZES", "whole_sides"]


def _resize_longest_edge_cut(cut: Cut, transform: ResizeLongestEdge) -> Cut:
    height, width = cut.height, cut.width
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
    return cut._replace(height=height, width=width)


def _resize_shortest_edge_cut(cut: Cut, transform: ResizeShortestEdge) -> Cut:
    edge, height, width = transform.shortest_edge, cut.height, cut.width
    if width <= height:
        return cut._replace(height=int(edge * height / width), width=edge)
    return cut._replace(height=edge, width=int(edge * width / height))


def _resize_to_side_cut(cut: Cut, transform: ResizeToSide) -> Cut:
    scale, whole = transform.side / max(cut.height, cut.width), int if transform.truncated else round
    height, width = (max(whole(side * scale), transform.least) for side in (cut.height, cut.width))
    # Truncation may lose a pixel of the longer side, too.
    if cut.width >= cut.height:
        return cut._replace(height=height, width=max(transform.side, transform.least))
    return cut._replace(height=max(transform.side, transform.least), width=width)


def _resize_to_multiple_cut(cut: Cut, transform: ResizeToMultiple) -> Cut:
    height, width, multiple = cut.height, cut.width, transform.multiple
    ratio = width / height
    if width >= height:
        width = _round_up(width, multiple)
        height = _round_up(int(width / ratio), multiple)
    else:
        height = _round_up(height, multiple)
        width = _round_up(int(height * ratio), multiple)
    return cut._replace(height=height, width=width)


def _resize_within_cut(cut: Cut, transform: ResizeWithin) -> Cut:
    height, width = cut.height, cut.width
    ratio = max(height / transform.longest_edge, width / transform.longest_edge)
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return cut._replace(height=_round_up(height, transform.multiple), width=_round_up(width, transform.multiple))


def _shrink_into_cut(cut: Cut, transform: ShrinkInto) -> Cut:
    scale = min(transform.height / cut.height, transform.width / cut.width)
    if scale >= 1:
        return cut
    return cut._replace(height=int(cut.height * scale), width=int(cut.width * scale))


def _fixed_cut(cut: Cut, transform: Resize | CenterCrop) -> Cut:
    return cut._replace(height=transform.height, width=transform.width)


def _pad_to_square_cut(cut: Cut, transform: PadToSquare) -> Cut:
    side = max(cut.height, cut.width)
    return cut._replace(height=side, width=side)


def _pad_to_multiple_cut(cut: Cut, transform: PadToMultiple) -> Cut:
    height, width = (_round_up(side, transform.multiple) for side in (cut.height, cut.width))
    return cut._replace(height=height, width=width)


def _resize_to_pixels_cut(cut: Cut, transform: ResizeToPixels) -> Cut:
    height, width, multiple = cut.height, cut.width, transform.multiple
    if transform.whole and min(height, width) < multiple:
        scale = max(multiple / height, multiple / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > transform.max_ratio:
        raise ImageError(
            f"an image of {height}×{width} px: one side is more than {transform.max_ratio:g} times the other",
            "crop the image to a less extreme aspect ratio",
        )
    bounds = transform.min_pixels, transform.max_pixels
    rows, cols = whole_sides(height, width, multiple, bounds, least=0, frames=cut.frames)
    return cut._replace(height=rows * multiple, width=cols * multiple)


def whole_sides(
    height: int, width: int, multiple: int, pixels: tuple[int, int], least: int, frames: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """The sides in multiples, each rounded (to `least` at least), then scaled where they make fewer or more `pixels`
    than the two bounds; `frames` as of `Cut`."""
    rows, cols = (max(least, round(side / multiple)) for side in (height, width))
    (count, taken), area = frames, rows * cols * multiple**2
    if taken * area > pixels[1]:
        shrink = math.sqrt(count * height * width / pixels[1])
        rows, cols = (max(1, math.floor(side / shrink / multiple)) for side in (height, width))
    elif taken * area < pixels[0]:
        grow = math.sqrt(pixels[0] / (count * height * width))
        rows, cols = (math.ceil(side * grow / multiple) for side in (height, width))
    return rows, cols


def _crop(tiles: list[Image.Image], transform: CenterCrop, after: Cut) -> list[Image.Image]:
    # Floor division also of negative offsets; what lies outside the image comes out black.
    left, top = (tiles[0].width - after.width) // 2, (tiles[0].height - after.height) // 2
    return [tile.crop((left, top, left + after.width, top + after.height)) for tile in tiles]


def _pad(tiles: list[Image.Image], transform: PadToSquare | PadToMultiple, after: Cut) -> list[Image.Image]:
    middle, padded = isinstance(transform, PadToSquare), []
    for tile in tiles:
        whole = Image.new("RGB", (after.width, after.height), transform.color)
        corner = ((after.width - tile.width) // 2, (after.height - tile.height) // 2) if middle else (0, 0)
        whole.paste(tile, corner)
        padded.append(whole)
    return padded


def _even(length: int) -> int:
    return length + length % 2


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


RESIZES: Mapping[type, How] = {
    ResizeLongestEdge: How(_resize_longest_edge_cut),
    ResizeShortestEdge: How(_resize_shortest_edge_cut),
    ResizeToSide: How(_resize_to_side_cut),
    ResizeToMultiple: How(_resize_to_multiple_cut),
    ResizeToPixels: How(_resize_to_pixels_cut),
    ResizeWithin: How(_resize_within_cut),
    ShrinkInto: How(_shrink_into_cut),
    Resize: How(_fixed_cut),
    CenterCrop: How(_fixed_cut, _crop),
    PadToSquare: How(_pad_to_square_cut, _pad),
    PadToMultiple: How(_pad_to_multiple_cut, _pad),
}
