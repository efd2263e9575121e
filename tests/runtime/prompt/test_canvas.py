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

from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.runtime.prompt.transforms.tiles import filled, on_canvas
from mllm_edge.spec import AspectRatioId, FitCanvas, ImagePrompt, ImageSpec, Normalize, Rescale

TILE = 28
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(1, 1), (1, 500), (500, 1), (2, 3), (27, 29), (28, 28), (28, 57), (56, 56), (57, 56), (84, 28), (28, 113)]
SIZES += [(40, 90), (90, 40), (61, 62), (112, 28), (150, 30), (30, 150), (200, 210), (333, 77), (1000, 999)]


def aspect_ratio_id(rows: int, cols: int, most: int) -> list[int]:
    image = ImageSpec((), ImagePrompt("<image>", 0, ""), TILE, TILE, 1, tables=(AspectRatioId(most),))
    return table_inputs(image, rows, cols, {})["aspect_ratio_id"].tolist()


@settings(max_examples=1500, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9), st.sampled_from([1, 14, 448, 560]))
def test_canvas_equals_transformers(height: int, width: int, most: int, tile: int) -> None:
    found = cut_of(height, width, (FitCanvas(tile, most, "bilinear"),))
    high, wide = get_optimal_tiled_canvas(height, width, most, tile)
    assert (found.rows * tile, found.cols * tile) == (high, wide)
    assert on_canvas(height, width, tile, (high, wide)) == get_image_size_fit_to_canvas(height, width, high, wide, tile)
    ids = convert_aspect_ratios_to_ids_np([[(found.rows, found.cols)]], most)
    assert [aspect_ratio_id(found.rows, found.cols, most)] == ids.tolist()
    assert found.slices == found.rows * found.cols <= most


@pytest.mark.parametrize("most", [1, 4, 6])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_equal_transformers(height: int, width: int, most: int) -> None:
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    size = {"height": TILE, "width": TILE}
    processor = MllamaImageProcessorPil(size=size, max_image_tiles=most, image_mean=MEAN, image_std=STD)
    expected = processor([image], return_tensors="np")

    transforms = (FitCanvas(TILE, most, "bilinear"), Rescale(1 / 255), Normalize(MEAN, STD))
    tiles, cut = apply_transforms(image, transforms), cut_of(height, width, transforms)
    assert len(tiles) == cut.slices == expected["num_tiles"][0][0] == expected["aspect_ratio_mask"].sum()
    assert aspect_ratio_id(cut.rows, cut.cols, most) == expected["aspect_ratio_ids"][0].tolist()
    np.testing.assert_array_equal(filled(tiles, most), expected["pixel_values"][0, 0])
