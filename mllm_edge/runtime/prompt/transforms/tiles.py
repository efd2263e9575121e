"""Transforms that cut an image into tiles."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.transforms.cut import RESAMPLE, Cut, How, resized
from mllm_edge.runtime.prompt.transforms.resize import whole_sides
from mllm_edge.spec import (
    CoverTiles,
    FillTiles,
    FitCanvas,
    FitPatches,
    FitTiles,
    SelectResolution,
    SelectTiles,
    SplitLarge,
    SplitTiles,
)

__all__ = ["TILES", "filled", "fitted", "nearest_resolution", "on_canvas"]


def _split_tiles_cut(cut: Cut, transform: SplitTiles) -> Cut:
    size = transform.size
    if cut.slices > 1:
        raise BundleError("split_tiles comes after split_tiles", "export the bundle again")
    if cut.height % size or cut.width % size:
        raise ImageError(
            f"{cut.height}×{cut.width} px cannot be cut into whole tiles of {size}×{size} px",
            "the bundle must resize to a multiple of the tile before it splits: export it again",
        )
    rows, cols = cut.height // size, cut.width // size
    return cut if rows * cols == 1 else Cut(size, size, rows, cols, rows * cols + 1)


def _select_tiles_cut(cut: Cut, transform: SelectTiles) -> Cut:
    if cut.slices > 1:
        raise BundleError("select_tiles comes after another split", "export the bundle again")
    size = transform.size
    rows, cols = _nearest_grid(cut.height, cut.width, transform)
    if rows * cols == 1:
        return Cut(size, size)
    return Cut(size, size, rows, cols, rows * cols + int(transform.overview))


def _nearest_grid(height: int, width: int, transform: SelectTiles | SplitLarge) -> tuple[int, int]:
    """(rows, cols) of the grid that SelectTiles describes."""
    least, most = transform.min_tiles, transform.max_tiles
    grids = [(rows, cols) for cols in range(1, most + 1) for rows in range(-(-least // cols), most // cols + 1)]
    if isinstance(transform, SelectTiles) and transform.max_side is not None:
        grids = [grid for grid in grids if max(grid) <= transform.max_side]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    ratio, area = width / height, width * height
    best, nearest = (1, 1), math.inf
    for rows, cols in grids:
        distance = abs(ratio - cols / rows)
        fits = area > 0.5 * transform.size * transform.size * cols * rows
        if distance < nearest or (distance == nearest and fits):
            best, nearest = (rows, cols), distance
    return best


def _cover_tiles_cut(cut: Cut, transform: CoverTiles) -> Cut:
    if cut.slices > 1:
        raise BundleError("cover_tiles comes after another split", "export the bundle again")
    size, most = transform.size, transform.max_tiles
    grids = [(rows, cols) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    grids.sort(key=math.prod)
    # Of each grid those parts are looked at that the turned one has, as in transformers.
    shown = {(rows, cols): _shown(cut.height, cut.width, (cols, rows), size) for rows, cols in grids}
    enough = [grid for grid in grids if shown[grid] > transform.covered]
    if enough:
        rows, cols = min(enough, key=lambda grid: (math.prod(grid), -shown[grid]))
    else:
        rows, cols = min(grids, key=lambda grid: (-shown[grid], math.prod(grid)))
    return Cut(size, size) if rows * cols == 1 else Cut(size, size, rows, cols, rows * cols + 1)


def _shown(height: int, width: int, grid: tuple[int, int], size: int) -> float:
    """The share of an image's area that is left where each part of a grid is scaled into a tile."""
    rows, cols = grid
    highs = [height // rows] * (rows - 1) + [height - height // rows * (rows - 1)]
    wides = [width // cols] * (cols - 1) + [width - width // cols * (cols - 1)]
    return sum(_kept(max(high, wide), min(high, wide), size) for high in highs for wide in wides) / (height * width)


def _kept(longer: float, shorter: float, size: int) -> float:
    """The area of a part, scaled down where it is longer than a tile."""
    return size * (shorter / longer * size) if longer > size else longer * shorter


def _fill_tiles_cut(cut: Cut, transform: FillTiles) -> Cut:
    if cut.slices > 1:
        raise BundleError("fill_tiles comes after another split", "export the bundle again")
    rows, cols = _filled_grid(cut.height, cut.width, transform)
    return Cut(transform.size, transform.size, rows, cols, rows * cols + 1)


def _filled_grid(height: int, width: int, transform: FillTiles) -> tuple[int, int]:
    """(rows, cols) of the grid that FillTiles describes."""
    size, ratio = transform.size, width / height
    alike: dict[float, list[tuple[int, int]]] = {}  # of one aspect ratio, the largest first
    for tiles in range(transform.max_tiles, 0, -1):
        for cols in (n for n in range(1, tiles + 1) if tiles % n == 0):
            alike.setdefault(cols / (tiles // cols), []).append((tiles // cols, cols))
    best, longest = None, 0
    for rows, cols in (grid for grids in alike.values() for grid in grids):
        if rows * size >= height and cols * size >= width:
            scale = min(cols * size / width, rows * size / height)
            # The longer side first, and the other one by the ratio: the rounding decides between grids.
            shorter = math.floor(scale * width / ratio if ratio >= 1 else scale * height * ratio)
            if shorter >= longest:
                best, longest = (rows, cols), shorter
    if best is not None:
        return best
    nearest = max(n for n in alike if n <= ratio) if ratio >= 1 else min(n for n in alike if n > ratio)
    return alike[nearest][0]


def _cover(tiles: list[Image.Image], transform: CoverTiles | FillTiles, after: Cut) -> list[Image.Image]:
    if after.slices == 1:
        return resized(tiles, transform, after)
    canvas = Cut(after.rows * transform.size, after.cols * transform.size)
    cut = _tiled(resized(tiles, transform, canvas)[0], transform.size, after)
    return [*resized(tiles, transform, after), *cut]


def _split(tiles: list[Image.Image], transform: SplitTiles, after: Cut) -> list[Image.Image]:
    if after.slices == 1:
        return tiles
    image, size = tiles[0], transform.size
    overview = image.resize((size, size), RESAMPLE[transform.resample])
    return [*_tiled(image, size, after), overview]


def _select(tiles: list[Image.Image], transform: SelectTiles, after: Cut) -> list[Image.Image]:
    if after.slices == 1:
        return resized(tiles, transform, after)
    canvas = Cut(after.rows * transform.size, after.cols * transform.size)
    cut = _tiled(resized(tiles, transform, canvas)[0], transform.size, after)
    # The overview is made from the image itself, not from the stretched one.
    return [*cut, *resized(tiles, transform, after)] if transform.overview else cut


def _tiled(image: Image.Image, size: int, grid: Cut) -> list[Image.Image]:
    corners = [(col * size, row * size) for row in range(grid.rows) for col in range(grid.cols)]
    return [image.crop((x, y, x + size, y + size)) for x, y in corners]


def nearest_resolution(height: int, width: int, transform: SelectResolution) -> tuple[int, int]:
    """(height, width) of the resolution that keeps most of an image's pixels; of several, that which wastes least."""

    def worth(resolution: tuple[int, int]) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - high * wide

    return max(transform.resolutions, key=worth)


def fitted(height: int, width: int, into: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image scaled into a resolution: one side fills it, the other is rounded up."""
    high, wide = into
    if wide / width < high / height:
        return min(math.ceil(height * (wide / width)), high), wide
    return high, min(math.ceil(width * (high / height)), wide)


def _select_resolution_cut(cut: Cut, transform: SelectResolution) -> Cut:
    if cut.slices > 1:
        raise BundleError("select_resolution comes after another split", "export the bundle again")
    size = transform.size
    height, width = nearest_resolution(cut.height, cut.width, transform)
    rows, cols = height // size, width // size
    return Cut(size, size, rows, cols, rows * cols + 1)


def _select_resolution(tiles: list[Image.Image], transform: SelectResolution, after: Cut) -> list[Image.Image]:
    image, canvas = tiles[0], (after.rows * transform.size, after.cols * transform.size)
    height, width = fitted(image.height, image.width, canvas)
    whole = Image.new("RGB", canvas[::-1])
    corner = ((canvas[1] - width) // 2, (canvas[0] - height) // 2)
    whole.paste(resized(tiles, transform, Cut(height, width))[0], corner)
    return [*resized(tiles, transform, after), *_tiled(whole, transform.size, after)]


def _split_large_cut(cut: Cut, transform: SplitLarge) -> Cut:
    if cut.slices > 1:
        raise BundleError("split_large comes after another split", "export the bundle again")
    cell, size, most = transform.cell, transform.size, transform.max_cells
    area = math.prod(max(transform.thinnest, round(side / cell) * cell) for side in (cut.height, cut.width))
    large = transform.max_tiles > 1 and area > transform.large * most * cell**2
    grid = _nearest_grid(cut.height, cut.width, transform) if large else (1, 1)
    if large and not transform.overview:
        return Cut(size, size, *grid, math.prod(grid))
    pixels = (transform.min_cells * cell**2, most * cell**2)
    rows, cols = whole_sides(cut.height, cut.width, cell, pixels, least=1)
    if rows * cols > max(most, (size // cell) ** 2 if transform.max_tiles > 1 else 0):
        raise ImageError(
            f"an image of {cut.height}×{cut.width} px takes {rows}×{cols} cells, and the model {most} at most",
            "crop the image to a less extreme aspect ratio",
        )
    whole = rows * cell, cols * cell
    return Cut(size, size, *grid, math.prod(grid) + 1, overview=whole) if large else Cut(*whole)


def _split_large(tiles: list[Image.Image], transform: SplitLarge, after: Cut) -> list[Image.Image]:
    if after.slices == 1:
        return resized(tiles, transform, after)
    canvas = Cut(after.rows * transform.size, after.cols * transform.size)
    cut = _tiled(resized(tiles, transform, canvas)[0], transform.size, after)
    return cut if after.overview is None else [*cut, *resized(tiles, transform, Cut(*after.overview))]


def _fit_canvas_cut(cut: Cut, transform: FitCanvas) -> Cut:
    if cut.slices > 1:
        raise BundleError("fit_canvas comes after another split", "export the bundle again")
    size = transform.size
    rows, cols = _canvas(cut.height, cut.width, transform)
    return Cut(size, size, rows, cols, rows * cols)


def _canvas(height: int, width: int, transform: FitCanvas) -> tuple[int, int]:
    """(rows, cols) of the canvas that FitCanvas describes."""
    most = transform.max_tiles
    grids = [(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
    scales = [min(rows * transform.size / height, cols * transform.size / width) for rows, cols in grids]
    chosen = min((scale for scale in scales if scale >= 1), default=max(scales))
    fitting = [grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen]
    return min(fitting, key=math.prod)


def on_canvas(height: int, width: int, tile: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image on a canvas of that size."""
    high, wide = min(max(height, tile), canvas[0]), min(max(width, tile), canvas[1])
    down, across = high / height, wide / width
    if across < down:
        return min(max(math.floor(height * across), 1), high), wide
    return high, min(max(math.floor(width * down), 1), wide)


def _fit_canvas(tiles: list[Image.Image], transform: FitCanvas, after: Cut) -> list[Image.Image]:
    image, canvas = tiles[0], (after.rows * transform.size, after.cols * transform.size)
    whole = Image.new("RGB", canvas[::-1])
    whole.paste(resized(tiles, transform, Cut(*on_canvas(image.height, image.width, transform.size, canvas)))[0])
    return _tiled(whole, transform.size, after)


def _fit_tiles_cut(cut: Cut, transform: FitTiles) -> Cut:
    if cut.slices > 1:
        raise BundleError("fit_tiles comes after another split", "export the bundle again")
    size, most = transform.size, transform.max_tiles
    rows, cols = -(-cut.height // size), -(-cut.width // size)
    if rows * cols > most:
        rows, cols = _nearest_grid(cut.height, cut.width, SelectTiles(size, 1, most, False, transform.resample))
    across, down = cols * size / cut.width, rows * size / cut.height
    shown = (int(cut.height * across), cols * size) if across < down else (rows * size, int(cut.width * down))
    if min(shown) < transform.least:
        raise ImageError(
            f"{cut.height}×{cut.width} px become {shown[0]}×{shown[1]}, and {transform.least} px are the least",
            "crop the image to a less extreme aspect ratio",
        )
    return Cut(size, size, rows, cols, rows * cols, shown=shown)


def _fit_tiles(tiles: list[Image.Image], transform: FitTiles, after: Cut) -> list[Image.Image]:
    assert after.shown is not None
    whole = Image.new("RGB", (after.cols * transform.size, after.rows * transform.size), "white")
    whole.paste(resized(tiles, transform, Cut(*after.shown))[0])
    return _tiled(whole, transform.size, after)


def _quarters(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the four quarters, row by row, and of the whole."""
    y, x = height // 2, width // 2
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height), (0, 0, width, height)]


def _within(height: int, width: int, transform: FitPatches) -> tuple[int, int]:
    """(height, width) of one of FitPatches' pictures, with what is no whole patch."""
    most, ratio = transform.longest, width / height
    if width >= height and width > most:
        height, width = int(most / ratio), most
    elif height > width and height > most:
        height, width = most, int(most * ratio)
    return max(height, transform.shortest), max(width, transform.shortest)


def _fit_patches_cut(cut: Cut, transform: FitPatches) -> Cut:
    if cut.slices > 1:
        raise BundleError("fit_patches comes after another split", "export the bundle again")
    if transform.quarters and min(cut.height, cut.width) < 2:
        raise ImageError(
            f"{cut.height}×{cut.width} px cannot be cut into quarters", "give an image of 2 px at least on each side"
        )
    boxes = _quarters(cut.height, cut.width) if transform.quarters else [(0, 0, cut.width, cut.height)]
    sizes = tuple(_within(bottom - top, right - left, transform) for left, top, right, bottom in boxes)
    whole = tuple((h // transform.patch * transform.patch, w // transform.patch * transform.patch) for h, w in sizes)
    return Cut(*whole[-1], 2, 2, len(whole), sizes=whole) if transform.quarters else Cut(*whole[0])


def _fit_patches(tiles: list[Image.Image], transform: FitPatches, after: Cut) -> list[Image.Image]:
    image, made = tiles[0], []
    boxes = _quarters(image.height, image.width) if transform.quarters else [(0, 0, image.width, image.height)]
    for box, (height, width) in zip(boxes, after.sizes or ((after.height, after.width),), strict=True):
        part = image.crop(box)
        part = resized([part], transform, Cut(*_within(part.height, part.width, transform)))[0]
        made.append(part.crop((0, 0, width, height)))
    return made


def filled(pixel_values: np.ndarray, slices: int) -> np.ndarray:
    """pixel_values [tiles, C, H, W] → [slices, C, H, W], zeros behind them."""
    missing = slices - len(pixel_values)
    return np.pad(pixel_values, ((0, missing), *[(0, 0)] * 3)) if missing else pixel_values


TILES: Mapping[type, How] = {
    SplitTiles: How(_split_tiles_cut, _split),
    SelectTiles: How(_select_tiles_cut, _select),
    CoverTiles: How(_cover_tiles_cut, _cover),
    FillTiles: How(_fill_tiles_cut, _cover),
    SelectResolution: How(_select_resolution_cut, _select_resolution),
    SplitLarge: How(_split_large_cut, _split_large),
    FitCanvas: How(_fit_canvas_cut, _fit_canvas),
    FitPatches: How(_fit_patches_cut, _fit_patches),
    FitTiles: How(_fit_tiles_cut, _fit_tiles),
}
