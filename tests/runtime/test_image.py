"""Decoding images of every kind."""

import base64
import contextlib
import io
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_utils import load_image as source_load_image

from mllm_edge.errors import ImageError
from mllm_edge.runtime.prompt.image import BGR, Pixels, load_image

from .reference import image_processor, picture


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(height=4, width=6):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width) * 10


# ---------------------------------------------------------------- sources
def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = picture(9, 7)
    expected = np.asarray(image)
    path = tmp_path / "ünï.png"
    path.write_bytes(encoded(image))
    data = path.read_bytes()
    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), image, expected]
    sources.append("data:image/png;base64," + base64.b64encode(data).decode())
    with path.open("rb") as file:
        sources.append(file)
        for source in sources:
            np.testing.assert_array_equal(pixels(source), expected, err_msg=str(type(source)))
    assert np.asarray(source_load_image(str(path))).tolist() == expected.tolist()


def test_the_image_passed_in_stays_as_it_is():
    image = picture(5, 4).convert("RGBA")
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    load_image(image)
    assert (image.mode, image.size, image.tobytes(), dict(image.getexif())) == ("RGBA", (4, 5), before, {0x0112: 6})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    stored = Image.fromarray(np.kron(np.array([[0, 90, 180], [250, 200, 30]], np.uint8), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored.convert("RGB"), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(pixels(data), expected)
    assert pixels(data).shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_is_ignored():
    data = encoded(picture(8, 8), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (8, 8, 3)


# ---------------------------------------------------------------- modes
def test_grey_and_one_bit():
    expected = np.repeat(grey()[..., None], 3, 2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey()))), expected)
    bits = np.array([[True, False, True]])
    np.testing.assert_array_equal(pixels(Image.fromarray(bits))[..., 0], [[255, 0, 255]])
    np.testing.assert_array_equal(pixels(bits)[..., 1], [[255, 0, 255]])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "RGBa"])
def test_transparency_is_composited_over_white(mode):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    if mode == "PA":
        source = Image.new("P", image.size)
        source.putalpha(image.getchannel("A"))
    else:
        source = image.convert(mode)
    np.testing.assert_array_equal(pixels(source)[0, :, 0], [0, 255, 127])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_equals_the_source_library(mode):
    image = picture(6, 8).convert("P" if mode == "P" else "RGB").convert(mode)
    if mode in ("P", "L"):
        image.info["transparency"] = 3 if mode == "P" else int(np.asarray(image)[0, 0])
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)))
    source = image_processor(8, 8, False, do_resize=False, do_rescale=False, do_normalize=False)
    expected = source.process_image(image, do_convert_rgb=True)
    np.testing.assert_array_equal(pixels(image).transpose(2, 0, 1), expected)


def test_palette_with_transparent_entry_from_file():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encoded(image))[0], [[10, 20, 30], [200, 100, 50]])
    np.testing.assert_array_equal(pixels(encoded(image, transparency=0))[0], [[255, 255, 255], [200, 100, 50]])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_models(mode):
    np.testing.assert_allclose(pixels(Image.new(mode, (1, 1))), np.asarray(Image.new(mode, (1, 1)).convert("RGB")))
    back = pixels(picture(4, 4).convert(mode)).astype(int)
    assert np.abs(back - np.asarray(picture(4, 4))).max() <= 12


def test_cmyk_jpeg():
    assert (
        np.abs(pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).astype(int) - [255, 0, 0]).max() < 4
    )


SIXTEEN = np.array([[0, 128, 129, 257, 32896, 65406, 65535]], np.uint16)
EIGHT = np.array([[0, 0, 1, 1, 128, 254, 255]], np.uint8)


@pytest.mark.parametrize("source", ["png", "tiff", "I;16B", "I", "array", "array, big-endian", "rgb array"])
def test_sixteen_bits_are_scaled_not_clipped(source):
    image = Image.fromarray(SIXTEEN)
    made = {
        "png": lambda: encoded(image),
        "tiff": lambda: encoded(image, "TIFF"),
        "I;16B": lambda: Image.frombytes("I;16B", image.size, SIXTEEN.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(SIXTEEN.astype(np.int32)),
        "array": lambda: SIXTEEN,
        "array, big-endian": lambda: SIXTEEN.astype(">u2"),
        "rgb array": lambda: np.repeat(SIXTEEN[..., None], 3, 2),
    }[source]()
    np.testing.assert_array_equal(pixels(made), np.repeat(EIGHT[..., None], 3, 2))


def test_every_sixteen_bit_value_is_rounded_to_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(pixels(values)[..., 0], np.rint(values / 257.0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_between_zero_and_one(dtype):
    values = np.array([[0.0, 0.5, 1.0]], dtype)
    np.testing.assert_array_equal(pixels(values)[..., 2], [[0, 128, 255]])
    np.testing.assert_array_equal(pixels(Image.fromarray(values.astype(np.float32)))[..., 2], [[0, 128, 255]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data)[0, 0], [250, 0, 0])


# ---------------------------------------------------------------- arrays
def test_shapes_of_arrays():
    rgb = np.asarray(picture(3, 5))
    np.testing.assert_array_equal(pixels(rgb), rgb)
    np.testing.assert_array_equal(pixels(rgb[..., 0]), np.repeat(rgb[..., :1], 3, 2))
    np.testing.assert_array_equal(pixels(rgb[..., :1]), np.repeat(rgb[..., :1], 3, 2))
    opaque = np.concatenate([rgb, np.full((3, 5, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(pixels(opaque), rgb)
    assert (pixels(opaque * np.array([1, 1, 1, 0], np.uint8)) == 255).all()


def test_views_that_are_not_contiguous():
    rgb = np.asarray(picture(8, 6))
    for view in (rgb[..., ::-1], rgb[::-1], rgb[:, ::2], rgb.transpose(1, 0, 2), rgb[1:4, 2:5], rgb[::2, :, 1]):
        expected = view if view.ndim == 3 else np.repeat(view[..., None], 3, 2)
        np.testing.assert_array_equal(pixels(view), expected)


def test_a_read_only_array_is_fine():
    rgb = np.asarray(picture(4, 4)).copy()
    rgb.flags.writeable = False
    np.testing.assert_array_equal(pixels(rgb), rgb)


# ---------------------------------------------------------------- what cannot be read
@pytest.mark.parametrize(
    ("source", "told"),
    [
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4, 3), np.complex64), "complex64"),
        (np.zeros((4, 4), object), "object"),
        (np.zeros((3, 4, 5), np.uint8), "channels='first'"),
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one by one"),
        (np.zeros(7, np.uint8), "(7,)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 0), np.uint8), "no pixels"),
        (np.full((2, 2), 1.5), "[0, 1]"),
        (np.full((2, 2), -0.1), "[0, 1]"),
        (np.full((2, 2), np.nan), "[0, 1]"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        (Image.fromarray(np.array([[70000]], np.int32)), "70000"),
        (Image.fromarray(np.array([[-1]], np.int32)), "-1"),
        (b"", "0 bytes"),
        (b"not an image at all", "19 bytes"),
        (io.BytesIO(b"nothing"), "BytesIO"),
        (12, "int"),
        (None, "NoneType"),
        ("http://example.org/a.png", "download"),
        ("data:image/png;base64,%%%", "data URI"),
        ("data:image/png,abc", "base64"),
        ("no\0path.png", "cannot be opened"),
    ],
)
def test_what_cannot_be_read_is_named(source, told):
    with pytest.raises(ImageError) as error:
        load_image(source)
    assert told in str(error.value)
    assert error.value.fix


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=str(tmp_path)):
        load_image(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg: not an image"):
        load_image(str(tmp_path / "text.jpg"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_truncated_files(kind, part):
    data = encoded(picture(64, 64), kind)
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image"):
        load_image(data[: int(len(data) * part)])


def test_truncated_file_that_the_caller_opened():
    data = encoded(picture(64, 64))
    with pytest.raises(ImageError, match="PIL image"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
def test_damaged_files_never_raise_anything_else(kind, data):
    image = bytearray(encoded(picture(12, 12), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert load_image(bytes(image)).mode == "RGB"


def test_decompression_bomb():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="too large"):
        load_image(bomb)


# ---------------------------------------------------------------- other ways to name an image
def test_bgr_frames(tiny_bundle):
    import mllm_edge

    rgb = np.asarray(picture(5, 7))
    alpha = np.concatenate([rgb, np.full((5, 7, 1), 90, np.uint8)], 2)
    np.testing.assert_array_equal(pixels(mllm_edge.BGR(rgb[..., ::-1])), rgb)
    np.testing.assert_array_equal(pixels(BGR(alpha[..., [2, 1, 0, 3]])), pixels(alpha))
    np.testing.assert_array_equal(pixels(BGR(rgb[..., ::-1] / np.float32(255))), rgb)
    with mllm_edge.VLM.load(tiny_bundle) as vlm:
        frame = BGR(np.ascontiguousarray(rgb[..., ::-1]))
        content = [{"type": "image", "image": frame}, {"type": "text", "text": "Hi"}]
        found = [vlm.generate("Hi", images, max_new_tokens=4).token_ids for images in (rgb, frame, [frame])]
        found.append(vlm.generate([{"role": "user", "content": content}], max_new_tokens=4).token_ids)
    assert len(set(found)) == 1


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8), "a.png", None, b"x"])
def test_bgr_of_something_else(array):
    with pytest.raises(ImageError, match="three or four channels"):
        load_image(BGR(array))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_stated_orders_and_axes(order, channels, count):
    stored = np.random.default_rng(1).integers(0, 256, (5, 7, count), dtype=np.uint8)
    places = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[count]
    plain = stored[..., places] if order == "BGR" else stored
    given = stored.transpose(2, 0, 1) if channels == "first" else stored
    for array in (given, np.ascontiguousarray(given), np.asfortranarray(given)):
        np.testing.assert_array_equal(pixels(Pixels(array, order, channels)), pixels(plain))


@pytest.mark.parametrize(
    ("dtype", "range_", "low", "high"),
    [
        (np.float32, {"white": 255}, 0, 255),
        (np.float64, {"black": -1, "white": 1}, -1, 1),
        (np.float16, {}, 0, 1),
        (np.int64, {"white": 255}, 0, 255),
        (np.int16, {"black": -128, "white": 127}, -128, 127),
        (np.uint16, {"white": 1023}, 0, 1023),
        (np.uint16, {"black": 64, "white": 4095}, 64, 4095),
        (np.uint32, {"black": 0}, 0, 2**32 - 1),
        (np.uint8, {"black": 16, "white": 235}, 16, 235),
    ],
)
def test_stated_ranges(dtype, range_, low, high):
    grey = np.array([0, 51, 102, 255])
    values = np.asarray(low + grey / 255 * (high - low))
    array = (np.rint(values) if np.dtype(dtype).kind != "f" else values).astype(dtype)[None]
    found = pixels(Pixels(array, **range_))[0, :, 0]
    step = 255 / (high - low) if np.dtype(dtype).kind != "f" else 0.1
    assert np.abs(found - grey.astype(int)).max() <= max(1, step)
    assert (found[0], found[-1]) == (0, 255)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Pixels(np.full((2, 2), 1.5, np.float32), white=1.0), "outside 0..1"),
        (Pixels(np.full((2, 2), np.nan), white=255), "outside 0..255"),
        (Pixels(np.full((2, 2), 300), white=255), "outside 0..255"),
        (Pixels(np.full((2, 2), 3, np.uint8), black=4), "outside 4..255"),
        (Pixels(np.zeros((2, 2)), black=1, white=1), "black is 1 and white 1"),
        (Pixels(np.zeros((2, 2)), white=float("inf")), "white inf"),
        (Pixels(np.zeros((2, 2), bool), white=1), "black and white are of numbers"),
        (Pixels(np.zeros((2, 2, 3), np.uint8), channels="first"), "leave channels='first' out"),
        (Pixels(np.zeros((3, 2, 2), np.uint8)), "looks like [C, H, W]"),
        (Pixels(np.zeros((2, 2, 3), np.uint8), "GRB"), "give 'RGB' or 'BGR'"),
        (Pixels(np.zeros((2, 2, 3), np.uint8), channels="CHW"), "give 'last' or 'first'"),
        (Pixels([[0]]), "pass Pixels a numpy array"),
        (Pixels(np.zeros((0, 2), np.uint8)), "no pixels"),
    ],
)
def test_statements_that_do_not_hold(wrong, told):
    with pytest.raises(ImageError) as error:
        load_image(wrong)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "form",
    [lambda a: a, BGR, lambda a: Pixels(a, "BGR"), lambda a: Pixels(a.transpose(2, 0, 1).copy(), "BGR", "first")],
)
def test_frames_are_not_copied_on_the_way_to_pillow(form):
    source = form(np.zeros((300, 400, 3), np.uint8))
    load_image(source)
    tracemalloc.start()
    try:
        load_image(source)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 300 * 400 / 2


def test_stated_pixels_stand_for_an_image(tiny_bundle):
    import mllm_edge

    rgb = np.asarray(picture(5, 7))
    stated = mllm_edge.Pixels(rgb.transpose(2, 0, 1) / 127.5 - 1, channels="first", black=-1, white=1)
    with mllm_edge.VLM.load(tiny_bundle) as vlm:
        assert len({vlm.generate("Hi", one, max_new_tokens=4).token_ids for one in (rgb, stated)}) == 1


@pytest.mark.parametrize("header", ["data:image/png;base64,", "DATA:;BASE64,", "data:image/png;name=a;base64,"])
@pytest.mark.parametrize("form", ["lines", "crlf", "indented", "url-safe", "unpadded", "percent"])
def test_base64_of_many_kinds(header, form):
    # Pixels whose base64 holds both characters that the alphabets differ in.
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    data = encoded(image)
    plain = base64.b64encode(data).decode()
    assert "+" in plain
    assert "/" in plain
    text = {
        "lines": base64.encodebytes(data).decode(),
        "crlf": base64.encodebytes(data).decode().replace("\n", "\r\n"),
        "indented": plain[:40] + "\n    " + plain[40:],
        "url-safe": base64.urlsafe_b64encode(data).decode(),
        "unpadded": plain.rstrip("="),
        "percent": plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    }[form]
    np.testing.assert_array_equal(pixels(header + text), np.asarray(image))


@pytest.mark.parametrize("payload", ["a", "abcde", "ab%%", "ab=cd", "é"])
def test_base64_that_is_none(payload):
    with pytest.raises(ImageError, match="data URI"):
        load_image(f"data:image/png;base64,{payload}")


def test_home_and_file_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "a picture #1 ü.png"
    picture(4, 4).save(path)
    expected = np.asarray(picture(4, 4))
    url = path.as_uri()
    sources = ["~/a picture #1 ü.png", Path("~/a picture #1 ü.png"), url, url.replace("file://", "FILE://localhost")]
    for source in [*sources, url.replace("file://", "file:")]:
        np.testing.assert_array_equal(pixels(source), expected)
    monkeypatch.chdir(tmp_path)
    picture(3, 3).save(tmp_path / "~x.png")
    assert pixels("~x.png").shape == (3, 3, 3)
    with pytest.raises(ImageError, match=r"~nobody-of-this-name/a\.png: no such file"):
        load_image("~nobody-of-this-name/a.png")
    with pytest.raises(ImageError, match="another machine"):
        load_image("file://elsewhere/a.png")
    with pytest.raises(ImageError, match="not downloaded"):
        load_image("HTTPS://example.org/a.png")


# ---------------------------------------------------------------- JPEG at a smaller scale
def photograph(width, height):
    random = np.random.default_rng(5)
    layers = [random.integers(0, 256, (height // n, width // n, 3), dtype=np.uint8) for n in (8, 40, 200)]
    pictures = [np.asarray(Image.fromarray(a).resize((width, height), Image.Resampling.BICUBIC), float) for a in layers]
    return Image.fromarray((0.1 * pictures[0] + 0.3 * pictures[1] + 0.6 * pictures[2]).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_at_a_smaller_scale_differs_by_little(tiny_bundle, orientation):
    from mllm_edge import VLM

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(2000, 1400), "JPEG", quality=90, exif=exif)
    with VLM.load(tiny_bundle) as whole, VLM.load(tiny_bundle, fast_jpeg=True) as fast:
        expected, found = (vlm.processor.process("Hi", data) for vlm in (whole, fast))
        assert [x.text for x in found.layouts] == [x.text for x in expected.layouts]
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        levels = np.abs(found.pixel_values - expected.pixel_values) * 255 / 2  # the tiny model's range is −1 to 1
        assert 0 < levels.max() <= 4
        png = encoded(photograph(300, 200))
        pictures = [vlm.processor.process("Hi", png).pixel_values for vlm in (whole, fast)]
        np.testing.assert_array_equal(*pictures)


def test_the_scale_is_twice_what_is_wanted():
    data = encoded(photograph(1600, 800), "JPEG")
    sizes = {
        wanted: load_image(data, lambda height, width, w=wanted: w).size for wanted in ((100, 200), (50, 90), None)
    }
    assert sizes == {(100, 200): (400, 200), (50, 90): (200, 100), None: (1600, 800)}
    assert load_image(data, lambda height, width: (height, width)).size == (1600, 800)
