"""The bundle's transforms against the source library's own image processors."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import (
    CenterCrop,
    Normalize,
    PadToMultiple,
    PadToSquare,
    Patchify,
    Rescale,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    ResizeToMultiple,
    ResizeToPixels,
    ResizeToSide,
    ResizeWithin,
    ShrinkInto,
    SplitTiles,
)

from .reference import image_processor, picture, transforms

SIZES = [(64, 64), (1, 1), (3, 5), (5, 3), (270, 480), (257, 33), (1, 400), (400, 1), (3000, 7), (63, 129), (65, 64)]


def run_source(source, image):
    out = source.preprocess([image], return_row_col_info=True)
    return np.asarray(out["pixel_values"])[0], int(out["rows"][0][0]), int(out["cols"][0][0])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_pixels_equal_the_source_library(size, split, resample):
    source = image_processor(64, 200, split, resample=resample)
    expected, rows, cols = run_source(source, picture(*size))
    actual = apply_transforms(picture(*size), transforms(source))
    cut = cut_of(*size, transforms(source))
    assert (cut.rows, cut.cols, cut.slices) == (max(rows, 1), max(cols, 1), len(actual))
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("tile", "edge"), [(64, 64), (50, 199), (64, 63)], ids=["one tile", "odd", "edge below tile"])
@pytest.mark.parametrize("size", [(30, 31), (17, 2), (2, 30)], ids=str)
def test_other_configurations_equal_the_source_library(tile, edge, size):
    source = image_processor(tile, edge, True)
    expected, rows, cols = run_source(source, picture(*size))
    actual = apply_transforms(picture(*size), transforms(source))
    cut = cut_of(*size, transforms(source))
    assert (cut.rows, cut.cols, cut.slices) == (max(rows, 1), max(cols, 1), len(actual))
    np.testing.assert_array_equal(actual, expected)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_VALUES = (Rescale(1 / 255), Normalize(CLIP_MEAN, CLIP_STD))


def assert_equal_to(source, size, steps):
    """One tile, pixels identical to the source library's."""
    expected = np.stack(source.preprocess([picture(*size)])["pixel_values"])
    actual = apply_transforms(picture(*size), steps)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)
    assert cut_of(*size, steps)[2:5] == (1, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("edge", "height", "width"), [(64, 64, 64), (57, 40, 31), (33, 64, 48), (20, 20, 70)])
def test_shortest_edge_and_center_crop_equal_the_source_library(size, edge, height, width):
    crop = {"height": height, "width": width}
    source = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop, resample=3)
    assert_equal_to(source, size, (ResizeShortestEdge(edge, "bicubic"), CenterCrop(height, width), *CLIP_VALUES))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_alone_equals_the_source_library(size):
    source = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 31, "width": 64})
    assert_equal_to(source, size, (CenterCrop(31, 64), *CLIP_VALUES))


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 1000], ids=str)
def test_padding_to_a_square_equals_the_source_library(size):
    crop = {"height": 48, "width": 48}
    source = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 48}, crop_size=crop)
    color = tuple(int(value * 255) for value in CLIP_MEAN)
    steps = (PadToSquare(color), ResizeShortestEdge(48, "bicubic"), CenterCrop(48, 48), *CLIP_VALUES)
    assert_equal_to(source, size, steps)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("side", "least"), [(48, 14), (33, 33), (64, 1)])
def test_longer_side_in_a_square_equals_the_source_library(size, side, least):
    source = DeepseekVLImageProcessorPil(size={"height": side, "width": side}, min_size=least)
    color = tuple(int(value * 255) for value in CLIP_MEAN)
    assert_equal_to(source, size, (ResizeToSide(side, least, "bicubic"), PadToSquare(color), *CLIP_VALUES))


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 1 and max(size) < 1000], ids=str)
@pytest.mark.parametrize(("multiple", "longest"), [(8, 96), (14, 100), (16, 16), (6, 5000)])
def test_fitting_within_a_longest_edge_equals_the_source_library(size, multiple, longest):
    source = PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size=multiple, do_pad=False)
    assert_equal_to(source, size, (ResizeWithin(multiple, longest, "bicubic"), *CLIP_VALUES))


@pytest.mark.parametrize("size", [*SIZES, (49, 49), (107, 107)], ids=str)
@pytest.mark.parametrize(("multiple", "least"), [(14, 336), (70, 1), (35, 490)])
def test_filling_up_equals_the_shown_part_of_the_source_library(size, multiple, least):
    source = AriaImageProcessorPil(max_image_size=490, min_image_size=least)
    found = source.preprocess([picture(*size)])
    height, width = (int(found["pixel_mask"][0].any(axis).sum()) for axis in (1, 0))
    filled = ResizeToSide(490, least, "bicubic", truncated=True), PadToMultiple(multiple, (0, 0, 0))
    half = Normalize((0.5,) * 3, (0.5,) * 3)
    actual = apply_transforms(picture(*size), (*filled, Rescale(1 / 255), half))
    cut = cut_of(*size, filled)
    assert (cut.height, cut.width) == actual.shape[2:]
    assert (cut.height, cut.width) == tuple(-(-side // multiple) * multiple for side in (height, width))
    np.testing.assert_array_equal(actual, found["pixel_values"][:, :, : cut.height, : cut.width])


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 1000], ids=str)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (1080, 1920), (256, 32)])
def test_fitting_into_two_sides_equals_the_source_library(size, height, width):
    sizes = {"size": {"height": height, "width": width}, "patch_size": {"height": 8, "width": 8}}
    half = Normalize((0.5,) * 3, (0.5,) * 3)
    steps = (ShrinkInto(height, width, "bilinear"), PadToMultiple(8, (1, 1, 1)), Rescale(1 / 255), half)
    try:
        found = FuyuImageProcessorPil(**sizes)(picture(*size))
    except ValueError:  # nothing is left of a side
        with pytest.raises(ImageError, match="shrink_into"):
            cut_of(*size, steps)
        return
    cut, actual = cut_of(*size, steps), apply_transforms(picture(*size), steps)
    assert (cut.height, cut.width) == tuple(
        -(-found[f"image_unpadded_{side}"][0][0] // 8) * 8 for side in ("heights", "widths")
    )
    np.testing.assert_array_equal(actual[0], np.asarray(found["images"][0][0])[:, : cut.height, : cut.width])


def test_strip_that_nothing_is_left_of_is_refused():
    with pytest.raises(ImageError, match=r"1×5000 px into 0×96 px"):
        cut_of(1, 5000, (ResizeWithin(8, 96, "bicubic"),))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stretching_equals_the_source_library(size):
    source = SiglipImageProcessorPil(size={"height": 54, "width": 40})
    half = Normalize((0.5,) * 3, (0.5,) * 3)
    assert_equal_to(source, size, (Resize(54, 40, "bicubic"), Rescale(1 / 255), half))


def test_strip_that_would_grow_without_bounds_is_refused():
    steps = (ResizeShortestEdge(336, "bicubic"), CenterCrop(336, 336))
    for call in (lambda: apply_transforms(Image.new("RGB", (20_000, 1)), steps), lambda: cut_of(1, 20_000, steps)):
        with pytest.raises(ImageError, match=r"1×20000 px into 336×6720000 px") as error:
            call()
        assert "aspect ratio" in error.value.fix


def test_longest_edge_over_the_limit():
    source = image_processor(32, 5000, True)
    _, rows, cols = source.get_number_of_image_patches(30, 31)
    assert cut_of(30, 31, transforms(source))[2:5] == (rows, cols, rows * cols + 1)
    assert cols == 4096 // 32


def test_full_hd():
    source = image_processor(512, 2048, True)
    image = picture(1080, 1920)
    expected, rows, cols = run_source(source, image)
    actual = apply_transforms(image, transforms(source))
    assert actual.shape == (13, 3, 512, 512)
    assert cut_of(1080, 1920, transforms(source))[2:5] == (rows, cols, 13) == (3, 4, 13)
    np.testing.assert_array_equal(actual, expected)
    assert cut_of(2048, 2048, transforms(source))[2:5] == (4, 4, 17)


@settings(max_examples=300, deadline=None)
@example(height=17, width=1, tile=1, edge=50, limit=49, split=True)
@given(
    st.integers(1, 120), st.integers(1, 120), st.integers(1, 16), st.integers(1, 90), st.integers(16, 80), st.booleans()
)
def test_grid_from_the_size_alone(height, width, tile, edge, limit, split):
    resize = (ResizeLongestEdge(edge, "nearest", limit),)
    steps = (ResizeToMultiple(tile, "nearest"), SplitTiles(tile, "nearest")) if split else (Resize(tile, 3, "box"),)
    image = Image.new("RGB", (width, height))
    try:
        cut = cut_of(height, width, resize + steps)
    except ImageError:  # so narrow that nothing is left of it
        with pytest.raises(ImageError):
            apply_transforms(image, resize + steps)
        return
    done = apply_transforms(image, resize + steps)
    assert cut.slices == len(done)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(512, 2048), (364, 1456), (384, 1536), (512, 512)]))
def test_grid_equals_the_source_library(height, width, sizes):
    source = image_processor(*sizes, True)
    _, rows, cols = source.get_number_of_image_patches(height, width)
    assert cut_of(height, width, transforms(source))[2:4] == (max(rows, 1), max(cols, 1))


def test_values_without_rescale_or_normalize():
    image = picture(4, 4)
    expected = np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32)
    np.testing.assert_array_equal(apply_transforms(image, ()), expected)
    scaled = apply_transforms(image, (Rescale(1 / 255),))
    np.testing.assert_allclose(scaled, expected / 255, atol=1e-7)
    both = apply_transforms(image, (Normalize((1.0, 2.0, 3.0), (2.0, 4.0, 8.0)),))
    np.testing.assert_allclose(both[0, 2], (expected[0, 2] - 3) / 8, atol=1e-6)


def test_grey_images_are_made_rgb_first():
    assert apply_transforms(Image.new("L", (4, 4)), ()).shape == (1, 3, 4, 4)


def test_sizes_that_cannot_be_processed():
    split = (SplitTiles(16, "nearest"),)
    for call in (lambda: apply_transforms(picture(20, 40), split), lambda: cut_of(20, 40, split)):
        with pytest.raises(ImageError, match=r"20×40 px .* 16×16"):
            call()
    with pytest.raises(ImageError, match="0×5"):
        cut_of(0, 5, split)


def test_transforms_that_cannot_follow_each_other():
    image = picture(32, 16)
    with pytest.raises(BundleError, match="resize"):
        apply_transforms(image, (Rescale(1.0), Resize(4, 4, "bilinear")))
    with pytest.raises(BundleError, match="split_tiles"):
        apply_transforms(image, (SplitTiles(16, "nearest"), SplitTiles(8, "nearest")))
    with pytest.raises(BundleError, match="1 means"):
        apply_transforms(image, (Normalize((0.5,), (0.5, 0.5, 0.5)),))


# ---------------------------------------------------------------- cells
def cells_source(patch=4, merge=2, frames=2, least=64, most=4096, **settings):
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=frames,
        size={"shortest_edge": least, "longest_edge": most},
        **settings,
    )


def cells_steps(source, resample="bicubic"):
    side = source.patch_size * source.merge_size
    resize = ResizeToPixels(side, source.size.shortest_edge, source.size.longest_edge, resample, 200.0)
    return (resize, *CLIP_VALUES, Patchify(source.patch_size, source.merge_size, source.temporal_patch_size))


@pytest.mark.parametrize(
    "size", [size for size in SIZES if max(size) / min(size) <= 200] + [(1, 200), (5, 1000)], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch": 14, "least": 3136, "most": 50 * 784},
        {"merge": 1, "frames": 1, "least": 1, "most": 5000},
        {"merge": 3, "patch": 5, "resample": 2},
        {"least": 4096, "most": 4096},
    ],
    ids=["small", "as published", "single patches", "bilinear", "one area"],
)
def test_cells_equal_the_source_library(size, settings):
    source = cells_source(**settings)
    steps = cells_steps(source, "bilinear" if "resample" in settings else "bicubic")
    expected = source.preprocess([picture(*size)], return_tensors="np")
    actual = apply_transforms(picture(*size), steps)
    merge = source.merge_size
    cut = cut_of(*size, steps)
    assert [1, cut.rows * merge, cut.cols * merge] == expected["image_grid_thw"][0].tolist()
    assert cut_of(*size, steps).slices == len(actual)
    values = 3 * source.temporal_patch_size * source.patch_size**2
    assert actual.shape == (cut.rows * cut.cols, merge**2, values)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual.reshape(-1, values), expected["pixel_values"])


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.sampled_from([(28, 3136, 12845056), (28, 3136, 1003520), (28, 200704, 401408), (10, 1, 3000), (6, 36, 36)]),
)
def test_resizing_to_an_area_equals_the_source_library(height, width, bounds):
    multiple, least, most = bounds
    steps = (ResizeToPixels(multiple, least, most, "bicubic", 200.0), Patchify(multiple, 1, 1))
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match="more than 200 times"):
            cut_of(height, width, steps)
        return
    rows, cols = (side // multiple for side in smart_resize(height, width, multiple, least, most))
    assert cut_of(height, width, steps)[2:5] == (rows, cols, rows * cols)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_every_pixel_has_its_place_in_the_cells(height, width, patch, merge, frames):
    side = patch * merge
    image = picture(height, width).resize((side * (width // 9 + 1), side * (height // 9 + 1)))
    steps = (Patchify(patch, merge, frames),)
    done, cut = apply_transforms(image, steps), cut_of(image.height, image.width, steps)
    cell = done.reshape(cut.rows, cut.cols, merge, merge, 3, frames, patch, patch)
    back = cell[:, :, :, :, :, -1].transpose(0, 2, 5, 1, 3, 6, 4).reshape(cut.rows * side, cut.cols * side, 3)
    np.testing.assert_array_equal(back, np.asarray(image))
    np.testing.assert_array_equal(cell[:, :, :, :, :, 0], cell[:, :, :, :, :, -1])


def test_sides_beyond_the_limit_are_refused_before_pixels_are_touched():
    steps = (ResizeToPixels(28, 3136, 100352, "bicubic", 200.0), Patchify(14, 2, 2))
    for size in [(1, 201), (6000, 29)]:
        with pytest.raises(ImageError, match=rf"{size[0]}×{size[1]} px: one side is more than 200") as error:
            cut_of(*size, steps)
        assert "aspect ratio" in error.value.fix
    assert cut_of(5800, 29, steps)  # 200 times


def test_tiles_become_grids_of_cells():
    steps, image = (SplitTiles(16, "bilinear"), Patchify(4, 2, 1)), picture(32, 48)
    cut, done = cut_of(32, 48, steps), apply_transforms(image, steps)
    assert (cut.rows, cut.cols, cut.grids) == (2, 3, ((2, 2),) * 7)
    assert cut.slices == len(done) == 28
    overview = image.resize((16, 16), Image.Resampling.BILINEAR)
    for tile, place in ((image.crop((32, 16, 48, 32)), 5), (overview, 6)):
        np.testing.assert_array_equal(done[4 * place : 4 * place + 4], apply_transforms(tile, steps[1:]))


def test_cells_that_cannot_be_cut():
    with pytest.raises(ImageError, match=r"20×40 px .* 16×16"):
        apply_transforms(picture(20, 40), (Patchify(8, 2, 1),))
    with pytest.raises(BundleError, match=r"rescale.* comes after patchify"):
        apply_transforms(picture(16, 16), (Patchify(8, 2, 1), Rescale(1.0)))
