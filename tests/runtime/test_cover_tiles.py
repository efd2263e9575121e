"""Tiles that cover the image, against Ovis 2's image processor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil, get_min_tile_covering_grid

from mllm_edge.errors import BundleError
from mllm_edge.runtime.prompt.layout import image_text, layout_of
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import CoverTiles, ImagePrompt, ImageSpec, Normalize, Rescale

from .reference import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(32, 32), (1, 1), (64, 64), (270, 480), (480, 270), (257, 33), (1, 400), (400, 1), (65, 64), (90, 60)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("most", [2, 6, 9])
def test_tiles_equal_the_source_library(size: tuple[int, int], most: int) -> None:
    source = Ovis2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=most, image_mean=MEAN, image_std=STD
    )
    steps = (CoverTiles(32, most, 0.9, "bicubic"), Rescale(1 / 255), Normalize(MEAN, STD))
    actual = apply_transforms(picture(*size), steps)
    np.testing.assert_array_equal(actual, source.preprocess([picture(*size)])["pixel_values"])
    assert cut_of(*size, steps).slices == len(actual)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 12), st.sampled_from([32, 448]))
def test_grid_equals_the_source_library(height: int, width: int, most: int, tile: int) -> None:
    cut = cut_of(height, width, (CoverTiles(tile, most, 0.9, "bicubic"),))
    assert (cut.cols, cut.rows) == get_min_tile_covering_grid((height, width), tile, most, 0.9)


def test_a_second_cut_is_refused() -> None:
    step = CoverTiles(8, 4, 0.9, "nearest")
    with pytest.raises(BundleError, match="comes after another split"):
        cut_of(64, 16, (step, step))


def test_text_of_an_overview_that_stands_first() -> None:
    prompt = ImagePrompt(".", 3, "<{image}#>", begin="<{image}#", tile="{image}", beside="|", between="/", overview=">")
    assert image_text(prompt, 2, 3, 2, 1) == "<.#..|..|../..|..|..>"
    image = ImageSpec((CoverTiles(8, 6, 0.9, "nearest"),), prompt, 8, 8, 1)
    assert layout_of(image, 8, 8).text == "<.#>"
    assert layout_of(image, 30, 8).text.count(".") == layout_of(image, 30, 8).slices
