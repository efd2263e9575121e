"""Images: decoding to RGB, and the bundle's transforms from an RGB image to `pixel_values`."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.spec import (
    CenterCrop,
    Normalize,
    PadToSquare,
    Rescale,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    ResizeToMultiple,
    SplitTiles,
    Transform,
)

__all__ = ["ImageSource", "ProcessedImage", "apply_transforms", "load_image", "tile_grid"]

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | IO[bytes]

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
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------- decoding
def load_image(source: ImageSource) -> Image.Image:
    """Decode `source` into a PIL image of mode RGB, 8 bits per channel, upright.

    `source` is a path, a `data:` URI, the bytes of an image file, a binary file object, a PIL image, or a numpy array
    [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] in RGB order. OpenCV frames are BGR: pass `frame[..., ::-1]`.

    - The EXIF orientation is applied; of an animation the first frame is taken.
    - Transparency (LA, RGBA, palette or colour key) is composited over white.
    - Grey is repeated into three channels. 16-bit samples are scaled to 8 bit by 1/257 (never clipped).
    - Arrays are uint8, uint16 (full range 65535), bool, or float in [0, 1].

    Raises ImageError for anything that is missing, truncated, not an image, too large to decode safely (Pillow's
    decompression-bomb limit), empty, or of a type, shape or value range that is not listed here.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, f"PIL image ({source.mode}, {source.width}×{source.height})")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), f"image bytes ({len(source)} bytes)")
    if isinstance(source, str) and source.startswith("data:"):
        data = _data_uri_bytes(source)
        return _from_file(io.BytesIO(data), f"data URI ({len(data)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source)
    if hasattr(source, "read"):
        return _from_file(source, f"file object {getattr(source, 'name', type(source).__name__)!r}")
    raise ImageError(
        f"cannot read an image from {type(source).__name__}",
        "pass a path, the bytes of an image file, a PIL image or a numpy array",
    )


def _from_path(source: str | os.PathLike) -> Image.Image:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(f"{source}: images are not downloaded", "download it first and pass the path or the bytes")
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _from_file(file, str(path))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file", "check the path of the image") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be opened ({reason})", "pass the path of a readable image file") from error


def _from_file(file: IO[bytes], name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return _from_pil(image, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _bomb(name, error) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image, or a format that Pillow cannot read here",
            "convert it to JPEG or PNG; from a camera or decoder pass the frame as a numpy array",
        ) from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged headers
        raise _damaged(name, error) from error


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise _bomb(name, error) from error
    except Exception as error:  # as above: damaged data surfaces as any exception type
        raise _damaged(name, error) from error
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name}: the image has no pixels", "check where the image comes from")
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # unreadable EXIF: the pixels are fine, so they are shown as stored
        orientation = None
    upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    rgb = _to_rgb(image, name)
    return rgb if upright is None else rgb.transpose(upright)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_grey16_to_8(np.asarray(image), name)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_float_to_8(np.asarray(image), name)).convert("RGB")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name}: colour mode {image.mode} has no conversion to RGB", "convert it to RGB") from error


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        fix = "pass [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            fix += "; this one looks like [C, H, W]: pass array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            fix += "; of a batch pass the images one by one"
        raise ImageError(f"{name}: not an image", fix)
    if array.size == 0:
        raise ImageError(f"{name}: the image has no pixels", "check where the image comes from")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    pixels = np.ascontiguousarray(_to_uint8(array, name))
    return _to_rgb(Image.fromarray(pixels), name)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _grey16_to_8(array, name)
    if array.dtype.kind == "f":
        return _float_to_8(array, name)
    raise ImageError(f"{name}: unsupported dtype", "convert it to uint8 (0..255), uint16 (0..65535) or float (0..1)")


def _grey16_to_8(array: np.ndarray, name: str) -> np.ndarray:
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: values {low}..{high} exceed 16 bits", "scale them to 0..255 and pass uint8")
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _float_to_8(array: np.ndarray, name: str) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        raise ImageError(
            f"{name}: float values {low:g}..{high:g} are outside [0, 1]", "scale them to 0..1, or pass uint8 (0..255)"
        )
    return np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)


def _data_uri_bytes(uri: str) -> bytes:
    header, _, payload = uri.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("only base64 data URIs are read")
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data URI {header[:40]!r}: {error}", "pass data:image/png;base64,<data>") from error


def _bomb(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: too large to decode safely ({error})", "scale the image down before passing it")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: truncated or damaged ({error})", "send the file again, or save it again as JPEG or PNG")


# ---------------------------------------------------------------- transforms
@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """`pixel_values` [tiles, channels, height, width] float32, and the grid the image was cut into.

    A grid of (0, 0) means one tile. Otherwise there are rows × cols tiles, row by row, then the overview.
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


def apply_transforms(image: Image.Image, transforms: Sequence[Transform]) -> ProcessedImage:
    """Apply `transforms` in order to an RGB image (see `load_image`): `pixel_values` [tiles, 3, H, W] float32.

    Resizing works on 8-bit pixels. Rescale and Normalize come last and are exact to float32 rounding.
    Raises ImageError when the image's size cannot be processed, BundleError for an impossible order of transforms.
    """
    if image.mode != "RGB":
        image = load_image(image)
    layout, tiles = _Layout(image.height, image.width), [image]
    # 8 bits have 256 values: Rescale and Normalize act on a table of them, and every pixel is looked up once.
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    on_values = False
    for transform in transforms:
        if isinstance(transform, (Rescale, Normalize)):
            table, on_values = _VALUES[type(transform)](table, transform), True
        elif on_values:
            raise BundleError(f"transform {transform.op!r} comes after rescale or normalize", "export the bundle again")
        else:
            after = _layout_after(layout, transform)
            tiles = _PIXELS.get(type(transform), _resize)(tiles, transform, after)
            layout = after
    return ProcessedImage(_look_up(tiles, table), layout.rows, layout.cols)


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


_LAYOUTS: dict[type, Callable[[_Layout, Any], _Layout]] = {
    ResizeLongestEdge: _resize_longest_edge_layout,
    ResizeShortestEdge: _resize_shortest_edge_layout,
    ResizeToMultiple: _resize_to_multiple_layout,
    Resize: _fixed_layout,
    CenterCrop: _fixed_layout,
    PadToSquare: _pad_to_square_layout,
    SplitTiles: _split_tiles_layout,
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
    corners = [(col * size, row * size) for row in range(after.rows) for col in range(after.cols)]
    overview = image.resize((size, size), _RESAMPLE[transform.resample])
    return [*(image.crop((x, y, x + size, y + size)) for x, y in corners), overview]


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
