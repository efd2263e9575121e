"""The tower and mergers of Qwen3-VL against transformers', and learned positions brought to an image's grid."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from mllm_edge.export.plan import TracedComponent, cell_components
from mllm_edge.export.vision.qwen3_vl import Qwen3VlConfig, Qwen3VlTower, qwen3_merger
from mllm_edge.runtime.prompt.learned_grid import cell_positions, interpolated_positions
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.spec import GridRope, ImagePrompt, ImageSpec, LearnedPositions, Patchify
from tests.export.towers import DIALECTS, FLOAT, HALF, opened, randomized, reader, saved

PATCH, HIDDEN, HEADS, TEXT, MERGE, SIDE = 4, 32, 2, 24, 2, 5
GRIDS = [(1, 1), (2, 3), (1, 7), (6, 1)]  # of cells


def config(taps: tuple[int, ...] = (0, 2), merge: int = MERGE, depth: int = 4) -> Qwen3VLVisionConfig:
    return Qwen3VLVisionConfig(
        depth=depth,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_heads=HEADS,
        patch_size=PATCH,
        spatial_merge_size=merge,
        out_hidden_size=TEXT,
        num_position_embeddings=SIDE**2,
        deepstack_visual_indexes=list(taps),
    )


def image_of(settings: Qwen3VLVisionConfig) -> ImageSpec:
    tables = (GridRope(1e4, HIDDEN // HEADS), LearnedPositions("places", SIDE, HIDDEN, corners=True))
    cells, prompt = Patchify(PATCH, settings.spatial_merge_size, 2), ImagePrompt("<image>", 9, "{image}")
    return ImageSpec((cells,), prompt, 8, 8, 1, tables=tables)


def parts(model: Qwen3VLVisionModel, settings: Qwen3VLVisionConfig) -> tuple[TracedComponent, TracedComponent]:
    """The tower with the mergers of its layers, and the merger of the last."""
    image = image_of(settings)
    assert image.patches is not None
    sizes = Qwen3VlConfig.read(reader(settings), image.patches)
    kernel = model.patch_embed.proj.weight.detach().numpy()
    derived = {"patch_embed.proj.weight": lambda: kernel.reshape(HIDDEN, -1)}
    made = (lambda: Qwen3VlTower(sizes, TEXT), lambda: qwen3_merger(sizes, TEXT))
    return cell_components(*made, image, (HIDDEN, TEXT), ("", "merger."), derived, len(sizes.taps))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (config(), FLOAT),
        (config(taps=(1, 3), merge=3), FLOAT),  # the last layer is one
        (config(taps=(), depth=1), FLOAT),
        (config(), HALF),
    ],
    ids=["two", "last", "none", "half"],
)
def test_parity(tmp_path: Path, dialect: str, settings: Qwen3VLVisionConfig, kind: ir.DataType) -> None:
    torch.manual_seed(0)
    model, merge = randomized(Qwen3VLVisionModel(settings)), settings.spatial_merge_size
    weights, image, values = saved(model, tmp_path), image_of(settings), 3 * 2 * PATCH**2
    encode, connect = (opened(part, weights, tmp_path, dialect, kind) for part in parts(model, settings))
    places, random = model.pos_embed.weight.detach().numpy(), np.random.default_rng(1)
    largest = 2e-5 if kind == FLOAT else 2e-2
    for rows, cols in GRIDS:
        pixels = random.standard_normal((rows * cols, merge**2, values)).astype(np.float32)
        with torch.no_grad():
            grid = torch.tensor([[1, rows * merge, cols * merge]])
            expected = model(torch.tensor(pixels).flatten(0, 1), grid_thw=grid)
        found = run(encode, {"pixel_values": pixels, **table_inputs(image, rows, cols, {"places": places})})
        hidden = expected.last_hidden_state.unflatten(0, (-1, merge**2))
        wanted = [hidden, *expected.deepstack_features, expected.pooler_output]
        found |= run(connect, found)
        taps = [f"deepstack.{k}" for k in range(len(settings.deepstack_visual_indexes))]
        assert list(found) == ["vision_hidden", *taps, "image_features"]
        for one, other in zip(found.values(), wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=largest * other.abs().max().item())


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs by name; inputs take the graph's type."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    typed = {spec.name: feeds[spec.name].astype(kinds[spec.type]) for spec in session.get_inputs()}
    names = [spec.name for spec in session.get_outputs()]
    return dict(zip(names, session.run(names, typed), strict=True))


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 5, 48])
@pytest.mark.parametrize(("rows", "cols"), [*GRIDS, (5, 5), (16, 24), (9, 60)])
def test_positions(rows: int, cols: int, side: int, merge: int) -> None:
    table = np.random.default_rng(2).standard_normal((side, side, 3)).astype(np.float32)
    found = cell_positions(table, rows, cols, merge, how="corners")
    assert found.shape == (rows * cols, merge**2, 3)
    assert found.dtype == np.float32
    grid = torch.tensor([[1, rows * merge, cols * merge]])
    index, weights = get_vision_interpolation_indices_and_weights(
        grid, side, align_corners=True, spatial_merge_size=merge
    )
    theirs = (torch.tensor(table).reshape(-1, 3)[index] * weights[..., None]).sum(1)
    np.testing.assert_allclose(found.reshape(-1, 3), theirs.numpy(), atol=1e-4)


def test_equal_sizes_change_nothing() -> None:
    table = np.random.default_rng(3).standard_normal((16, 16, 2)).astype(np.float32)
    np.testing.assert_array_equal(interpolated_positions(table, 16, 16, how="corners"), table)
