"""The tower and merger of Qwen2.5-VL against transformers', and the windows of a grid."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from mllm_edge.errors import ConfigError
from mllm_edge.export.vision.qwen25_vl import Qwen25VlConfig, Qwen25VlTower, qwen25_merger
from mllm_edge.runtime.prompt.tables import grid_rope, table_inputs
from mllm_edge.runtime.prompt.windows import grid_windows
from mllm_edge.spec import GridRope, GridWindows, ImagePrompt, ImageSpec, Patchify, TensorSpec
from tests.export.towers import DIALECTS, FLOAT, HALF, component, opened, randomized, reader, run, saved

MERGE, TEXT = 2, 24
# Of cells, in windows of 3 × 3: one, less than a window, one and several whole ones, ragged, lines.
GRIDS = [(1, 1), (2, 1), (3, 3), (6, 3), (3, 9), (4, 5), (7, 3), (2, 8), (1, 7), (10, 1)]


def config(full: tuple[int, ...] = (1, 4), window: int = 24, depth: int = 6) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        depth=depth,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=MERGE,
        window_size=window,
        out_hidden_size=TEXT,
        fullatt_block_indexes=list(full),
    )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (config(), FLOAT),
        (config(full=(0, 2, 3)), FLOAT),
        (config(full=(1, 7), window=29, depth=2), FLOAT),  # ends whole; a window of no whole number of cells
        (config(full=(), depth=2), FLOAT),
        (config(full=(1, 3), depth=4), HALF),
    ],
    ids=["inside", "ends", "uneven", "windows", "half"],
)
def test_parity(tmp_path: Path, dialect: str, settings: Qwen2_5_VLVisionConfig, kind: ir.DataType) -> None:
    torch.manual_seed(0)
    model = randomized(Qwen2_5_VisionTransformerPretrainedModel(settings))
    weights, sizes = saved(model, tmp_path), Qwen25VlConfig.read(reader(settings))
    hidden, values, half = sizes.sizes.hidden_size, sizes.sizes.patch_values, 8
    width = sizes.side**2 * MERGE**2
    seen = TensorSpec("vision_hidden", "float32", ("cells", MERGE**2, hidden))
    kernel = model.patch_embed.proj.weight.detach().numpy()
    tower = component(
        "vision_encoder",
        lambda: Qwen25VlTower(sizes),
        (
            TensorSpec("pixel_values", "float32", ("cells", MERGE**2, values)),
            TensorSpec("cos", "float32", ("cells", MERGE**2, half)),
            TensorSpec("sin", "float32", ("cells", MERGE**2, half)),
            TensorSpec("window_index", "int64", ("windows", sizes.side**2)),
            TensorSpec("window_bias", "float32", ("windows", 1, width, width)),
            TensorSpec("cell_index", "int64", ("cells",)),
        ),
        seen,
        derived={"patch_embed.proj.weight": lambda: kernel.reshape(hidden, -1)},
    )
    features = TensorSpec("image_features", "float32", ("cells", TEXT))
    merger = component("connector", lambda: qwen25_merger(sizes, TEXT), (seen,), features, "merger.")
    encode, connect = (opened(part, weights, tmp_path, dialect, kind) for part in (tower, merger))

    tables, random = (GridRope(1e4, 2 * half), GridWindows(sizes.side)), np.random.default_rng(1)
    image = ImageSpec((Patchify(4, MERGE, 2),), ImagePrompt("<image>", 9, "{image}"), 8, 8, 1, tables=tables)
    for rows, cols in GRIDS:
        pixels = random.standard_normal((rows * cols, MERGE**2, values)).astype(np.float32)
        with torch.no_grad():
            grid = torch.tensor([[1, rows * MERGE, cols * MERGE]])
            expected = model(torch.tensor(pixels).flatten(0, 1), grid_thw=grid)
        found = run(encode, {"pixel_values": pixels, **table_inputs(image, rows, cols, {})})
        order = get_vision_window_index(grid, MERGE, settings.window_size, 4)[0]
        wanted = expected.last_hidden_state.unflatten(0, (-1, MERGE**2))[order.argsort()].numpy()
        largest = 2e-5 if kind == FLOAT else 2e-2
        np.testing.assert_allclose(found, wanted, atol=largest * np.abs(wanted).max())
        connected, wanted = run(connect, {"vision_hidden": found}), expected.pooler_output.numpy()
        np.testing.assert_allclose(connected, wanted, atol=largest * np.abs(wanted).max())


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), [*GRIDS, (4, 4), (12, 8), (40, 61)])
def test_windows(rows: int, cols: int, side: int, merge: int) -> None:
    index, bias, back = grid_windows(GridWindows(side), rows, cols, merge)
    windows = -(-rows // side) * -(-cols // side)
    assert (index.shape, index.dtype) == ((windows, side**2), np.int64)
    assert (bias.shape, bias.dtype) == ((windows, 1, (side * merge) ** 2, (side * merge) ** 2), np.float32)
    assert (back.shape, back.dtype) == ((rows * cols,), np.int64)
    np.testing.assert_array_equal(index.reshape(-1)[back], np.arange(rows * cols))
    assert (bias == bias[:, :, :1]).all()  # the same keys for every query
    seen = bias[:, 0, 0].reshape(windows, side**2, merge**2) == 0
    assert (bias[bias != 0] == -30000).all()
    assert (seen == seen[:, :, :1]).all()
    grid = torch.tensor([[1, rows * merge, cols * merge]])
    order, ends = get_vision_window_index(grid, merge, side * merge * 14, 14)
    np.testing.assert_array_equal(index[seen[:, :, 0]], order.numpy())
    np.testing.assert_array_equal(np.cumsum(seen.sum((1, 2))), ends[1:].numpy())


def test_rotary_tables_are_qwen2s() -> None:
    model = Qwen2_5_VisionTransformerPretrainedModel(config(depth=1))
    places = torch.tensor([[r, c] for r in range(MERGE) for c in range(MERGE)])
    expected = model.rotary_pos_emb(torch.zeros(1), places)
    for ours, theirs in zip(grid_rope(GridRope(1e4, 16), 1, 1, MERGE), expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[:, :8].numpy(), atol=1e-6)


def test_window_smaller_than_a_cell() -> None:
    with pytest.raises(ConfigError, match="window_size 7 is smaller than 2 patches of 4 px"):
        Qwen25VlConfig.read(reader(config(window=7)))
