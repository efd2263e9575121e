"""Tiles chosen by aspect ratio, against the source library's image processor."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil

from mllm_edge.errors import BundleError
from mllm_edge.json_form import from_json, to_json
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import ImagePrompt, ImageSpec, Normalize, Rescale, SelectTiles, SplitTiles

from .reference import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALUES = (Rescale(1 / 255), Normalize(MEAN, STD))
SIZES = [
    (32, 32),
    (1, 1),
    (64, 64),
    (270, 480),
    (480, 270),
    (257, 33),
    (1, 400),
    (400, 1),
    (65, 64),
    (90, 60),
    (33, 50),
]
LIMITS = [(1, 1), (1, 2), (1, 6), (1, 12), (2, 3), (3, 3), (5, 12), (7, 7)]


def source_processor(tile: int, least: int, most: int, **changes) -> GotOcr2ImageProcessorPil:
    size = {"height": tile, "width": tile}
    limits = {"min_patches": least, "max_patches": most}
    return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, image_mean=MEAN, image_std=STD, **limits | changes)


def source_tiles(source: GotOcr2ImageProcessorPil, image: Image.Image, overview: bool) -> np.ndarray:
    """The library's own steps, with or without the whole image at the end."""
    tiles = source.crop_image_to_patches(
        np.asarray(image).transpose(2, 0, 1),
        source.min_patches,
        source.max_patches,
        use_thumbnail=overview,
        patch_size=source.size,
        resample=source.resample,
    )
    values = [source.normalize(source.rescale(tile, source.rescale_factor), MEAN, STD) for tile in tiles]
    return np.stack(values)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_tiles_equal_the_source_library(size, limits):
    source = source_processor(32, *limits)
    steps = (SelectTiles(32, *limits, True, "bicubic"), *VALUES)
    actual = apply_transforms(picture(*size), steps)
    assert actual.dtype == np.float32
    if limits != (1, 1):  # then the library's processor does not come to its choice of tiles
        assert len(actual) == source.get_number_of_image_patches(*size)
    np.testing.assert_array_equal(actual, source.preprocess([picture(*size)])["pixel_values"])
    assert cut_of(*size, steps).slices == len(actual)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("overview", [True, False])
@pytest.mark.parametrize(("tile", "resample", "name"), [(20, 2, "bilinear"), (17, 1, "lanczos"), (32, 0, "nearest")])
def test_overview_is_the_image_itself_and_comes_last(size, overview, tile, resample, name):
    source = source_processor(tile, 1, 6, resample=resample)
    actual = apply_transforms(picture(*size), (SelectTiles(tile, 1, 6, overview, name), *VALUES))
    np.testing.assert_array_equal(actual, source_tiles(source, picture(*size), overview))


def test_grids_of_known_sizes():
    step = SelectTiles(448, 1, 12, True, "bicubic")
    for size, grid in {
        (448, 448): (1, 1, 1),  # two by two would be as near, and more than twice as large
        (900, 900): (2, 2, 5),
        (960, 960): (3, 3, 10),
        (1080, 1920): (2, 4, 9),
        (800, 1200): (2, 3, 7),
        (3000, 200): (12, 1, 13),
    }.items():
        assert cut_of(*size, (step,))[2:5] == grid


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12), st.integers(0, 28), st.sampled_from([32, 448]))
def test_number_of_tiles_equals_the_source_library(height, width, least, more, tile):
    source = source_processor(tile, least, least + more)
    tiles = cut_of(height, width, (SelectTiles(tile, least, least + more, True, "bicubic"),)).slices
    assert tiles == source.get_number_of_image_patches(height, width)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 60), st.integers(2, 16))
def test_ties_are_broken_like_in_the_source_library(columns, rows, halves, unit, most):
    """Sizes in the middle between two grids, or exactly on several: half steps of small ratios."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    height, width = 2 * rows * unit, (2 * columns + halves % 2) * unit
    expected = get_optimal_tiled_canvas((height, width), (16, 16), 1, most)
    cut = cut_of(height, width, (SelectTiles(16, 1, most, False, "bicubic"),))
    assert (cut.cols, cut.rows) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_grid_from_the_size_alone(height, width, least, more, overview):
    steps = (SelectTiles(8, least, least + more, overview, "nearest"),)
    done = apply_transforms(Image.new("RGB", (width, height)), steps)
    assert cut_of(height, width, steps).slices == len(done)


def test_tiles_of_tiles_are_refused():
    select = SelectTiles(8, 4, 4, True, "nearest")
    for steps in ((select, select), (SplitTiles(16, "nearest"), select), (select, SplitTiles(4, "nearest"))):
        with pytest.raises(BundleError, match="comes after"):
            cut_of(32, 32, steps)


def test_json_of_bundles_before_and_after():
    prompt = ImagePrompt("<i>", 3, "<{image}>", begin="<", tile="{image}", overview="{image}>")
    spec = ImageSpec((SelectTiles(8, 1, 6, False, "bicubic"),), prompt, 8, 8, 4)
    data = json.loads(json.dumps(to_json(spec)))
    assert from_json(ImageSpec, data) == spec
    del data["prompt"]["begin"]
    assert from_json(ImageSpec, data).prompt.begin == ""


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(1, 32), (1, 17), (3, 20), (18, 40)]))
def test_no_more_tiles_along_a_side_than_granite_docling_has_words_for(height, width, limits):
    size = {"height": 32, "width": 32}
    source = GraniteDoclingImageProcessorPil(size=size, min_patches=limits[0], max_patches=limits[1])
    cut = cut_of(height, width, (SelectTiles(32, *limits, True, "bicubic", 16),))
    assert (cut.rows, cut.cols) == source.get_tile_grid(height, width)
    assert cut.slices == source.get_number_of_image_patches(height, width)
