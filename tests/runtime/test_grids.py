"""What follows an image's grid, against transformers: the tower's rotary tables and the positions of a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids

from mllm_edge.errors import ImageError
from mllm_edge.runtime.encode import Components, encoded, looked_at
from mllm_edge.runtime.prompt.layout import Layout, grid_positions, layout_of
from mllm_edge.runtime.prompt.learned_grid import cell_positions
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.shown import Shown
from mllm_edge.runtime.prompt.tables import grid_rope, table_inputs
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import (
    GridMerge,
    GridRope,
    ImagePrompt,
    ImageSpec,
    LearnedPositions,
    Patchify,
    ResizeWithin,
    Stage,
    View,
)
from tests.runtime.reference import model_spec

IMAGE = 9
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (9, 2), (40, 60)])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize(("dim", "theta"), [(4, 1e4), (12, 50.0), (80, 1e4)])
def test_rotary_tables_equal_transformers(rows: int, cols: int, merge: int, dim: int, theta: float) -> None:
    rope = {"rope_type": "axial", "rope_theta": theta}
    config = Qwen2VLVisionConfig(embed_dim=2 * dim, num_heads=2, rope_parameters=rope)
    places = get_vision_position_ids(torch.tensor([[1, rows * merge, cols * merge]]), merge)
    expected = Qwen2VLVisionRotaryEmbedding(config)(torch.zeros(1), places)
    for ours, theirs in zip(grid_rope(GridRope(theta, dim), rows, cols, merge), expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (rows * cols, merge**2, dim // 2)
        assert np.abs(ours.reshape(-1, dim // 2) - theirs[:, : dim // 2].numpy()).max() <= 2e-7 + 2**-22 * 60 * merge


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (9, 2), (40, 60)])
@pytest.mark.parametrize(("dim", "theta"), [(4, 1e4), (16, 50.0), (64, 1e4)])
def test_alternating_rotary_tables_equal_transformers(rows: int, cols: int, dim: int, theta: float) -> None:
    rope = {"rope_type": "axial", "rope_theta": theta}
    config = PixtralVisionConfig(hidden_size=2 * dim, num_attention_heads=2, rope_parameters=rope)
    places = torch.from_numpy(np.indices((rows, cols)).reshape(2, -1).T.copy())
    expected = PixtralVisionRotaryEmbedding(config)(torch.zeros(1), places)
    found = grid_rope(GridRope(theta, dim, alternate=True), rows, cols, 1)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours[:, 0] - theirs[:, : dim // 2].numpy()).max() <= 2e-7 + 2**-22 * 60


@given(st.integers(1, 4), grids)
def test_merged_cells_are_those_of_unfold(side: int, grid: tuple[int, int]) -> None:
    rows, cols = grid
    image = ImageSpec((Patchify(4, 1, 1),), PROMPT, 4, 4, 1, tables=(GridMerge(side),))
    found = table_inputs(image, rows, cols, {})["merged_cells"]
    cells = torch.arange(rows * cols, dtype=torch.float32).reshape(1, 1, rows, cols)
    expected = torch.empty((0, side**2))
    if min(grid) >= side:
        expected = torch.nn.functional.unfold(cells, side, stride=side)[0].T
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype == np.int64


def test_rows_of_merged_cells_have_a_word_between_them() -> None:
    prompt = ImagePrompt("<i>", IMAGE, "[{image}]", between="|")
    image = ImageSpec((ResizeWithin(4, 40, "bicubic"), Patchify(4, 1, 1)), prompt, 4, 4, 1, tables=(GridMerge(2),))
    layout = layout_of(image, 19, 25)  # 5 × 7 cells
    assert (layout.text, layout.tokens, layout.slices) == ("[<i><i><i>|<i><i><i>]", 6, 35)
    with pytest.raises(ImageError, match="1×7 cells makes no features"):
        layout_of(image, 4, 25)


def of_cells(rows: int, cols: int) -> Layout:
    return Layout(rows, cols, rows * cols, 1, rows * cols, "", None)


class _Positions:
    """The part of transformers' model that makes positions, without its weights."""

    get_rope_index = Qwen2VLModel.get_rope_index
    get_vision_position_ids = Qwen2VLModel.get_vision_position_ids

    def __init__(self, merge: int):
        self.config = Qwen2VLConfig(vision_config={"spatial_merge_size": merge})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), grids), max_size=5), st.integers(0, 12), st.sampled_from([1, 2, 3]))
def test_positions_equal_transformers(images: list[Any], after: int, merge: int) -> None:
    """Images of any grids, with text before each (transformers needs some between two) and after the last."""
    kinds: list[int] = []
    for before, (rows, cols) in images:
        kinds += [0] * before
        kinds += [1] * (rows * cols)
    kinds += [0] * (after if images else after + 1)
    patches = torch.tensor([[1, rows * merge, cols * merge] for _, (rows, cols) in images])
    expected, shift = _Positions(merge).get_rope_index(torch.tensor([kinds]), torch.tensor([kinds]), patches)
    ours = grid_positions(len(kinds), np.flatnonzero(kinds), [of_cells(*grid) for _, grid in images])
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, expected[:, 0].numpy())
    assert ours.max() + 1 - len(kinds) == shift.item()  # what the decoder goes on with


def test_images_side_by_side() -> None:
    positions = grid_positions(8, np.arange(7), [of_cells(2, 3), of_cells(1, 1)])
    assert positions.tolist() == [[0] * 6 + [3, 4], [0, 0, 0, 1, 1, 1, 3, 4], [0, 1, 2, 0, 1, 2, 3, 4]]


def test_positions_of_text() -> None:
    nowhere = np.zeros(0, np.int64)
    assert grid_positions(3, nowhere, []).tolist() == [[0, 1, 2]] * 3
    assert grid_positions(0, nowhere, []).shape == (3, 0)


PROMPT = ImagePrompt("<image>", IMAGE, "{image}")


def shown_of(layouts: Sequence[Layout], inputs: dict[str, np.ndarray]) -> tuple[Shown, ...]:
    """Images of these layouts, their slices one behind the other in `inputs`."""
    ends = np.cumsum([layout.slices for layout in layouts])
    starts = [0, *ends[:-1].tolist()]
    return tuple(
        Shown(layout, {name: array[start:end] for name, array in inputs.items()}, (1, 1))
        for layout, start, end in zip(layouts, starts, ends.tolist(), strict=True)
    )


def runs_of(
    image: ImageSpec,
    per: str,
    pixel_values: np.ndarray,
    layouts: list[Layout],
    views: dict[str, np.ndarray] | None = None,
    **arrays: np.ndarray,
) -> list[dict[str, np.ndarray]]:
    """What one stage is given, run by run."""
    given: list[dict[str, np.ndarray]] = []

    def run(component: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert component == "encoder"
        given.append(inputs)
        return {"vision_hidden": inputs["pixel_values"]}

    names = [*image.inputs, *(name for table in image.tables for name in table.names)]
    model = replace(model_spec(image), stages=(Stage("encoder", "vision", per),))
    nothing = np.zeros(0, np.int64)
    prompt = Prompt("", nothing, shown_of(layouts, {"pixel_values": pixel_values, **(views or {})}), nothing)
    made = list[dict[str, dict[str, np.ndarray]]]()
    looked_at(Components(model, {"encoder": names}, run, slices=4), prompt, arrays, Trace(), made.append)
    for outputs, inputs in zip(made, given, strict=True):
        np.testing.assert_array_equal(outputs["encoder"]["vision_hidden"], inputs["pixel_values"])
    return given


def test_one_run_per_image_of_cells() -> None:
    image = ImageSpec((Patchify(4, 2, 1),), PROMPT, 8, 8, 1, tables=(GridRope(1e4, 8), GridRope(5.0, 4, ("c", "s"))))
    assert image.shape == (4, 3 * 16)
    pixel_values = np.arange(10 * 4 * 48, dtype=np.float32).reshape(10, 4, 48)
    runs = runs_of(image, "image", pixel_values, [of_cells(2, 3), of_cells(1, 4)])
    assert [sorted(feeds) for feeds in runs] == [["c", "cos", "pixel_values", "s", "sin"]] * 2
    np.testing.assert_array_equal(runs[0]["pixel_values"], pixel_values[:6])
    np.testing.assert_array_equal(runs[1]["pixel_values"], pixel_values[6:])
    np.testing.assert_array_equal(runs[1]["cos"], grid_rope(GridRope(1e4, 8), 1, 4, 2)[0])
    np.testing.assert_array_equal(runs[1]["s"], grid_rope(GridRope(5.0, 4), 1, 4, 2)[1])


def test_one_run_per_grid_of_an_image_in_tiles() -> None:
    learned = LearnedPositions("places", 3, 5)
    image = ImageSpec((Patchify(4, 2, 1),), PROMPT, 8, 8, 1, tables=(learned,))
    layouts = [Layout(1, 2, 9, 3, 9, "", None, ((2, 2), (2, 2), (1, 1))), of_cells(1, 3)]
    pixel_values = np.arange(12 * 4 * 48, dtype=np.float32).reshape(12, 4, 48)
    places = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    runs = runs_of(image, "image", pixel_values, layouts, places=places)
    assert [len(feeds["pixel_values"]) for feeds in runs] == [4, 4, 1, 3]
    np.testing.assert_array_equal(np.concatenate([feeds["pixel_values"] for feeds in runs]), pixel_values)
    for feeds, grid in zip(runs, ((2, 2), (2, 2), (1, 1), (1, 3)), strict=True):
        expected = cell_positions(places.reshape(3, 3, 5), *grid, 2)
        np.testing.assert_array_equal(feeds["position_embeds"], expected)
        assert expected.shape == (grid[0] * grid[1], 4, 5)


def test_features_take_the_places_of_image_tokens() -> None:
    """And what is added behind a layer stands there too, zeros elsewhere."""
    image = ImageSpec((Patchify(4, 2, 1),), PROMPT, 8, 8, 1)
    stages = (Stage("encoder", "vision", "image"), Stage("connector", "connector", "image"))
    pixel_values = np.arange(3 * 4 * 48, dtype=np.float32).reshape(3, 4, 48)

    def run(component: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if component == "encoder":
            return {"vision_hidden": inputs["pixel_values"] + 1}
        features = inputs["vision_hidden"][:, 0, :5]
        return {"image_features": features, "deepstack.0": -features}

    model = replace(model_spec(image), stages=stages)
    names = {"encoder": ["pixel_values"], "connector": ["vision_hidden"]}
    ids, places = np.array([7, IMAGE, IMAGE, 7, IMAGE]), np.array([1, 2, 4])
    shown = shown_of((of_cells(1, 2), of_cells(1, 1)), {"pixel_values": pixel_values})
    prompt = Prompt("", ids, shown, places)
    found = encoded(Components(model, names, run, 4), prompt, lambda ids: np.full((len(ids), 5), 0.5), {}, Trace())
    expected = pixel_values[:, 0, :5] + 1
    np.testing.assert_array_equal(found.embeds[places], expected)
    np.testing.assert_array_equal(found.embeds[[0, 3]], 0.5)
    np.testing.assert_array_equal(found.per_token["deepstack.0"][places], -expected)
    np.testing.assert_array_equal(found.per_token["deepstack.0"][[0, 3]], 0)


def test_some_tiles_per_run() -> None:
    image = ImageSpec((), PROMPT, 2, 2, 3)
    assert image.shape == (3, 2, 2)
    pixel_values = np.arange(9 * 12, dtype=np.float32).reshape(9, 3, 2, 2)
    layouts = [Layout(2, 2, 5, 5, 15, "", None), Layout(1, 3, 4, 4, 12, "", None)]
    runs = runs_of(image, "slice", pixel_values, layouts)
    assert all(list(feeds) == ["pixel_values"] for feeds in runs)
    np.testing.assert_array_equal(np.concatenate([feeds["pixel_values"] for feeds in runs]), pixel_values)
    assert [len(feeds["pixel_values"]) for feeds in runs] == [4, 4, 1]


@pytest.mark.parametrize(("per", "counts"), [("slice", [4, 1]), ("image", [1] * 5)])
def test_views_go_with_their_images(per: str, counts: list[int]) -> None:
    image = ImageSpec((), PROMPT, 2, 2, 3, views=(View("large", (), 4, 4),))
    assert image.inputs == {"pixel_values": (3, 2, 2), "large": (3, 4, 4)}
    small, large = (np.random.default_rng(0).standard_normal((5, 3, side, side)) for side in (2, 4))
    runs = runs_of(image, per, small, [Layout(1, 1, 1, 1, 3, "", None)] * 5, {"large": large})
    assert [len(feeds["large"]) for feeds in runs] == counts
    np.testing.assert_array_equal(np.concatenate([feeds["large"] for feeds in runs]), large)
    np.testing.assert_array_equal(np.concatenate([feeds["pixel_values"] for feeds in runs]), small)


@pytest.mark.parametrize(
    ("both_ways", "spans", "of_text"),
    [(None, None, None), ("image", [0, 1, 1, 0, 2, 2, 0], None), ("prompt", [1] * 7, [1, 1])],
)
def test_what_sees_each_other(both_ways: Any, spans: list[int] | None, of_text: list[int] | None) -> None:
    image = ImageSpec((), PROMPT, 2, 2, 2, both_ways=both_ways)
    model = replace(model_spec(image), stages=(Stage("encoder", "vision", "slice"),))
    run = lambda component, inputs: {"image_features": np.ones((2, 2, 5), np.float32)}  # noqa: E731
    components = Components(model, {"encoder": ["pixel_values"]}, run, 4)
    ids = np.array([7, IMAGE, IMAGE, 7, IMAGE, IMAGE, 7])
    layouts = (Layout(1, 1, 1, 1, 2, "", None),) * 2
    pixels = {"pixel_values": np.zeros((2, 3, 2, 2), np.float32)}
    shown = Prompt("", ids, shown_of(layouts, pixels), np.array([1, 2, 4, 5]))
    told = Prompt("", ids[[0, 3]], (), np.zeros(0, np.int64))
    for prompt, expected in ((shown, spans), (told, of_text)):
        found = encoded(components, prompt, lambda ids: np.zeros((len(ids), 5)), {}, Trace()).spans
        assert found is None if expected is None else found.tolist() == expected
