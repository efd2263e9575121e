"""What is special about GLM-4V: how sizes are rounded, and learned positions brought to a grid bicubically."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

from mllm_edge.errors import ImageError
from mllm_edge.runtime.prompt.learned_grid import interpolated_positions
from mllm_edge.runtime.prompt.transforms.apply import cut_of
from mllm_edge.spec import ResizeToPixels


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(12544, 9633792), (400, 3000), (2, 10**8)]))
def test_sizes_equal_the_source_library(height: int, width: int, bounds: tuple[int, int]) -> None:
    step = ResizeToPixels(28, bounds[0] // 2, bounds[1] // 2, "bicubic", 200.0, whole=True)
    try:
        expected = smart_resize(2, height, width, 2, 28, *bounds)
    except ValueError:
        with pytest.raises(ImageError, match="200 times"):
            cut_of(height, width, (step,))
        return
    cut = cut_of(height, width, (step,))
    assert (cut.height, cut.width) == expected


@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (24, 24), (40, 7)])
@pytest.mark.parametrize("side", [1, 6, 24])
def test_positions_equal_those_of_grid_sample(side: int, grid: tuple[int, int]) -> None:
    table = np.random.default_rng(0).standard_normal((side, side, 5), dtype=np.float32)
    rows, cols = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in grid)
    points = torch.stack([cols.expand(len(rows), -1), rows[:, None].expand(-1, len(cols))], -1)[None]
    source = torch.from_numpy(table).permute(2, 0, 1)[None]
    expected = torch.nn.functional.grid_sample(
        source, points, mode="bicubic", align_corners=False, padding_mode="border"
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(interpolated_positions(table, *grid, how="cubic"), expected.numpy(), atol=2e-5)
