"""Images on a canvas of tiles, against the processor of Llama 3.2 Vision in transformers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    convert_aspect_ratios_to_ids_np,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from mllm_edge.runtime.prompt.canvas import canvas_of, canvas_tiles, with_missing_tiles
from mllm_edge.runtime.prompt.transforms.values import VALUES, look_up
from mllm_edge.spec import Normalize, Rescale

TILE = 28
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(1, 1), (1, 500), (500, 1), (2, 3), (27, 29), (28, 28), (28, 57), (56, 56), (57, 56), (84, 28), (28, 113)]
SIZES += [(40, 90), (90, 40), (61, 62), (112, 28), (150, 30), (30, 150), (200, 210), (333, 77), (1000, 999)]


@settings(max_examples=1500, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9), st.sampled_from([1, 14, 448, 560]))
def test_canvas_equals_transformers(height: int, width: int, most: int, tile: int) -> None:
    found = canvas_of(height, width, tile, most)
    high, wide = get_optimal_tiled_canvas(height, width, most, tile)
    assert (found.rows * tile, found.cols * tile) == (high, wide)
    assert (found.height, found.width) == get_image_size_fit_to_canvas(height, width, high, wide, tile)
    assert [[found.aspect_ratio_id]] == convert_aspect_ratios_to_ids_np([[(found.rows, found.cols)]], most).tolist()
    assert found.tiles == found.rows * found.cols <= most


@pytest.mark.parametrize("most", [1, 4, 6])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_equal_transformers(height: int, width: int, most: int) -> None:
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    size = {"height": TILE, "width": TILE}
    processor = MllamaImageProcessorPil(size=size, max_image_tiles=most, image_mean=MEAN, image_std=STD)
    expected = processor([image], return_tensors="np")

    canvas = canvas_of(height, width, TILE, most)
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    for transform in (Rescale(1 / 255), Normalize(MEAN, STD)):
        table = VALUES[type(transform)](table, transform)
    tiles = look_up(canvas_tiles(image, canvas, TILE), table)
    assert len(tiles) == canvas.tiles == expected["num_tiles"][0][0] == expected["aspect_ratio_mask"].sum()
    assert canvas.aspect_ratio_id == expected["aspect_ratio_ids"][0, 0]
    np.testing.assert_array_equal(with_missing_tiles(tiles, most), expected["pixel_values"][0, 0])
