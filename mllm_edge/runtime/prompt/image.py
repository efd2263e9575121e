"""Images: decoding of every kind to RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from mllm_edge.errors import ImageError
from mllm_edge.runtime.foreign import pass_on

__all__ = ["BGR", "ImageSource", "Pixels", "Wanted", "image_path", "load_image", "open_file"]

Order = Literal["RGB", "BGR"]
Channels = Literal["last", "first"]


@dataclass(frozen=True, eq=False)
class BGR:
    """An array [H, W, 3] in BGR order, or [H, W, 4] in BGRA order, as OpenCV gives frames; elsewhere like an array."""

    array: np.ndarray


@dataclass(frozen=True, eq=False)
class Pixels:
    """An array and what its numbers mean, where that is not what `load_image` takes an array for.

    `order`: of its colours. `channels`: "last" [H, W, C] or "first" [C, H, W], of 1, 3 or 4 channels; the fourth is
    opacity. `black`, `white`: the numbers of the darkest and the brightest, of any whole or float dtype: 0 and 255 of
    floats, −1 and 1 of what was normalized, 0 and 1023 of a sensor of 10 bits; None: 0 and, of floats, 1, else the
    dtype's largest. What lies beyond them is refused, never clipped.
    """

    array: np.ndarray
    order: Order = "RGB"
    channels: Channels = "last"
    black: float | None = None
    white: float | None = None


ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | BGR | Pixels | IO[bytes]

# Modules of Pillow and of its plugins (pillow_heif, pillow_avif, …).
_PILLOW = ("PIL", "pillow")
_SCHEME = re.compile(r"(data|file):|([A-Za-z][A-Za-z0-9+.-]+)://", re.I)
_URL_SAFE = str.maketrans("-_", "+/")
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


# Told the upright size (height, width) of a JPEG file before it is decoded; says what it will be brought to, or None.
Wanted = Callable[[int, int], tuple[int, int] | None]


def load_image(source: ImageSource, wanted: Wanted | None = None) -> Image.Image:
    """Decode `source` into a PIL image of mode RGB, 8 bits per channel, upright.

    `source` is a path (`~` is the home folder), a `file:` URL, a base64 `data:` URI (line breaks and the URL-safe
    alphabet are fine), the bytes of an image file, a binary file object, a PIL image, or a numpy array [H, W],
    [H, W, 1], [H, W, 3] or [H, W, 4] in RGB order. OpenCV frames are BGR: pass `BGR(frame)`; for any other order of
    colours or axes, and other ranges, `Pixels` states them. Nothing of an array is guessed.

    - The EXIF orientation is applied; of an animation the first frame is taken.
    - Transparency (LA, RGBA, palette or colour key) is composited over white.
    - Grey is repeated into three channels. 16-bit samples are scaled to 8 bit by 1/257 (never clipped).
    - Arrays are uint8, uint16 (full range 65535), bool, or float in [0, 1].
    - With `wanted` a JPEG file may come at a half, a quarter or an eighth of its size, twice what is wanted at least:
      quicker, but the pixels of the wanted size differ by a few grey levels from those of the whole.

    Raises ImageError for anything that is missing, truncated, not an image, too large to decode safely (Pillow's
    decompression-bomb limit), empty, or of a type, shape or value range that is not listed here.
    """
    if isinstance(source, BGR):
        _require_colours(source.array)
        return _from_pixels(Pixels(source.array, "BGR"))
    if isinstance(source, np.ndarray):
        return _from_pixels(Pixels(source))
    if isinstance(source, Pixels):
        return _from_pixels(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, f"PIL image ({source.mode}, {source.width}×{source.height})")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), f"image bytes ({len(source)} bytes)", wanted)
    if isinstance(source, str) and _scheme(source) == "data":
        data = _data_uri_bytes(source)
        return _from_file(io.BytesIO(data), f"data URI ({len(data)} bytes)", wanted)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, wanted)
    if hasattr(source, "read"):
        return _from_file(source, f"file object {getattr(source, 'name', type(source).__name__)!r}", wanted)
    raise ImageError(
        f"cannot read an image from {type(source).__name__}",
        "pass a path, the bytes of an image file, a PIL image or a numpy array",
    )


def image_path(source: str | os.PathLike) -> Path:
    """The file that a path or a `file:` URL names; `~` is the home folder, unless there is such a file.

    Raises ImageError for a URL of another kind or another machine.
    """
    scheme = _scheme(source) if isinstance(source, str) else ""
    if scheme in ("http", "https", "ftp", "s3", "gs"):
        raise ImageError(f"{source}: images are not downloaded", "download it first and pass the path or the bytes")
    if scheme == "file":
        url = urlsplit(str(source))
        if url.netloc not in ("", "localhost"):
            raise ImageError(f"{source}: the file is on another machine", "write file:///PATH, or pass the path")
        from urllib.request import url2pathname  # with it come HTTP and TLS, which take a while to import

        return Path(url2pathname(url.path))
    path = Path(source)
    try:
        return path if not str(path).startswith("~") or path.exists() else path.expanduser()
    except (RuntimeError, ValueError, OSError) as error:  # nobody's home; a NUL in the path
        pass_on(error)
        return path


def _scheme(text: str) -> str:
    match = _SCHEME.match(text)
    return (match[1] or match[2]).lower() if match else ""


def _require_colours(array: np.ndarray) -> None:
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] not in (3, 4):
        what = f"of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ImageError(f"BGR({what}) has no three or four channels", "pass BGR an array [H, W, 3] or [H, W, 4]")


def open_file(path: Path, kind: str = "image") -> IO[bytes]:
    """The file of an image, or of another `kind`; raises ImageError for one that is not there or cannot be read."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        pass_on(error)
        raise ImageError(f"{path}: no such file", f"check the path of the {kind}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        pass_on(error)
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be opened ({reason})", f"pass the path of a readable {kind} file") from error


def _from_path(source: str | os.PathLike, wanted: Wanted | None) -> Image.Image:
    path = image_path(source)
    with open_file(path) as file:
        return _from_file(file, str(path), wanted)


def _from_file(file: IO[bytes], name: str, wanted: Wanted | None = None) -> Image.Image:
    with _decoding(name):
        image = Image.open(file)
        if wanted is not None and image.format == "JPEG":
            _reduce(image, wanted)
    with image:
        return _from_pil(image, name)


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    with _decoding(name):
        image.load()
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name}: the image has no pixels", "check where the image comes from")
    orientation = _orientation(image)
    upright = None if orientation is None else _UPRIGHT.get(orientation)
    rgb = _to_rgb(image, name)
    return rgb if upright is None else rgb.transpose(upright)


def _reduce(image: Image.Image, wanted: Wanted) -> None:
    """Have a JPEG decoded at a smaller scale, where that is twice the wanted size at least."""
    aside = _orientation(image) in (5, 6, 7, 8)
    size = wanted(image.width, image.height) if aside else wanted(image.height, image.width)
    if size is not None:
        height, width = reversed(size) if aside else size
        image.draft(None, (2 * width, 2 * height))


def _orientation(image: Image.Image) -> int | None:
    try:
        found = image.getexif().get(_EXIF_ORIENTATION)
    except Exception as error:  # unreadable EXIF: the pixels are fine, so they are shown as stored
        pass_on(error, *_PILLOW)
        return None
    return found if isinstance(found, int) else None


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Errors of Pillow in the body become ImageErrors that tell `name`; others stay what they are."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: too large to decode safely ({error})", "scale the image down before passing it"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image, or a format that Pillow cannot read here",
            "convert it to JPEG or PNG; from a camera or decoder pass the frame as a numpy array",
        ) from error
    except MemoryError as error:
        raise _with_a_message(error, name) from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged headers and data
        pass_on(error, *_PILLOW)
        if isinstance(error, OSError) and "out of memory" in str(error):  # a decoder's own code for it
            raise MemoryError(f"{name}: not enough memory to decode the image") from error
        raise ImageError(
            f"{name}: truncated or damaged ({error})", "send the file again, or save it again as JPEG or PNG"
        ) from error


def _with_a_message(error: MemoryError, name: str) -> MemoryError:
    """The same error; Pillow's has no text."""
    if not error.args:
        error.args = (f"{name}: not enough memory to decode the image",)
    return error


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


def _from_pixels(source: Pixels) -> Image.Image:
    array = source.array
    _require_stated(source)
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    axis = 0 if source.channels == "first" else 2
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[axis] not in (1, 3, 4)):
        raise ImageError(f"{name}: not an image", _array_fix(array, axis))
    if array.size == 0:
        raise ImageError(f"{name}: the image has no pixels", "check where the image comes from")
    stated = source.black is not None or source.white is not None
    pixels = _scaled(source, name) if stated else _to_uint8(array, name)
    if array.ndim == 3 and array.shape[axis] == 1:
        pixels = pixels[0] if axis == 0 else pixels[..., 0]
    return _to_rgb(_image_of(pixels, source.order, axis), name)


def _require_stated(source: Pixels) -> None:
    if not isinstance(source.array, np.ndarray):
        raise ImageError(f"Pixels of {type(source.array).__name__}", "pass Pixels a numpy array")
    for name, words in (("order", get_args(Order)), ("channels", get_args(Channels))):
        if getattr(source, name) not in words:
            raise ImageError(
                f"Pixels with {name}={getattr(source, name)!r:.40}", f"give {' or '.join(map(repr, words))}"
            )


def _array_fix(array: np.ndarray, axis: int) -> str:
    if axis == 0:
        return "pass [1, H, W], [3, H, W] or [4, H, W], or leave channels='first' out"
    fix = "pass [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        fix += "; this one looks like [C, H, W]: pass Pixels(array, channels='first')"
    elif array.ndim == 4:
        fix += "; of a batch pass the images one by one"
    return fix


def _image_of(pixels: np.ndarray, order: Order, axis: int) -> Image.Image:
    """uint8 pixels [H, W], [H, W, C] or [C, H, W] as Pillow has them: copied once, into its own memory."""
    if pixels.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(pixels))
    if axis == 0:
        places = (2, 1, 0, 3) if order == "BGR" else (0, 1, 2, 3)
        bands = [Image.fromarray(np.ascontiguousarray(pixels[i])) for i in places[: len(pixels)]]
        return Image.merge("RGBA" if len(bands) == 4 else "RGB", bands)
    height, width, count = pixels.shape
    data, mode = np.ascontiguousarray(pixels), "RGBA" if count == 4 else "RGB"
    stored = mode if order == "RGB" else "BGRA" if count == 4 else "BGR"
    return Image.frombytes(mode, (width, height), data.data, "raw", stored)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _grey16_to_8(array, name)
    if array.dtype.kind == "f":
        return _float_to_8(array, name)
    fix = (
        "convert it to uint8 (0..255), uint16 (0..65535) or float (0..1), or state its range: Pixels(array, white=255)"
    )
    raise ImageError(f"{name}: unsupported dtype", fix)


def _scaled(source: Pixels, name: str) -> np.ndarray:
    """Pixels of a stated range as uint8."""
    array = source.array
    if array.dtype.kind not in "uif":
        raise ImageError(f"{name}: black and white are of numbers", "pass whole numbers or floats")
    bright = 1.0 if array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
    black, white = source.black or 0.0, bright if source.white is None else source.white
    if not (np.isfinite([black, white]).all() and black < white):
        raise ImageError(f"{name}: black is {black!r} and white {white!r}", "give two numbers, the smaller for black")
    if (black, white) == (0, 255) and array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= black and high <= white):  # also true for NaN
        fix = "state the range that they have: Pixels(array, black=…, white=…)"
        raise ImageError(f"{name}: values {low:g}..{high:g} are outside {black:g}..{white:g}", fix)
    return np.rint((array.astype(np.float32) - np.float32(black)) * np.float32(255 / (white - black))).astype(np.uint8)


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
        if not header.lower().endswith(";base64"):
            raise ValueError("only base64 data URIs are read")
        text = "".join(unquote(payload).split()).translate(_URL_SAFE)
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data URI {header[:40]!r}: {error}", "pass data:image/png;base64,<data>") from error
