"""SigLIP 2's tower and LFM2-VL's connector against transformers', and positions brought to an image's grid."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers.models.lfm2_vl.configuration_lfm2_vl import Lfm2VlConfig
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlModel
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from mllm_edge.export.vision.siglip2 import CellConnector, CellConnectorConfig, Siglip2Tower, read_siglip2
from mllm_edge.runtime.prompt.learned_grid import cell_positions, interpolated_positions
from mllm_edge.spec import TensorSpec
from tests.export.towers import DIALECTS, FLOAT, HALF, component, opened, randomized, reader, run, saved

PATCH, HIDDEN, SIDE, LAYERS, TEXT = 4, 32, 4, 2, 24
VALUES = 3 * PATCH**2
# Of cells.
GRIDS = [(1, 1), (2, 3), (1, 5), (4, 2)]


def config(merge: int = 2, head: bool = True, **projector: object) -> Lfm2VlConfig:
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "num_patches": SIDE**2,
        "vision_use_head": head,
    }
    text = {"model_type": "lfm2", "hidden_size": TEXT, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 32, "layer_types": ["conv"]}
    return Lfm2VlConfig(
        vision_config=vision, text_config=text, downsample_factor=merge, projector_hidden_size=40, **projector
    )


def of_cells(patches: np.ndarray, rows: int, cols: int, merge: int) -> np.ndarray:
    """[rows · merge · cols · merge, D] row by row → [cells, merge², D]."""
    grid = patches.reshape(rows, merge, cols, merge, -1)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * cols, merge**2, -1)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (config(), FLOAT),
        (config(projector_use_layernorm=False, projector_bias=False, head=False), FLOAT),
        (config(merge=3), FLOAT),
        (config(), HALF),
    ],
    ids=["norm", "plain", "three", "half"],
)
def test_parity(tmp_path: Path, dialect: str, settings: Lfm2VlConfig, kind: ir.DataType) -> None:
    torch.manual_seed(0)
    model, merge = randomized(Lfm2VlModel(settings)), settings.downsample_factor
    weights, sizes = saved(model, tmp_path), read_siglip2(reader(settings.vision_config))
    seen = TensorSpec("vision_hidden", "float32", ("cells", merge**2, HIDDEN))
    inputs = (
        TensorSpec("pixel_values", "float32", ("cells", merge**2, VALUES)),
        TensorSpec("position_embeds", "float32", ("cells", merge**2, HIDDEN)),
    )
    tower = component("vision_encoder", lambda: Siglip2Tower(sizes, merge), inputs, seen, "vision_tower.")
    wide = CellConnectorConfig.read(reader(settings), HIDDEN, TEXT)
    features = TensorSpec("image_features", "float32", ("cells", TEXT))
    connector = component("connector", lambda: CellConnector(wide), (seen,), features, "multi_modal_projector.")
    encode, connect = (opened(part, weights, tmp_path, dialect, kind) for part in (tower, connector))

    random = np.random.default_rng(1)
    images = [random.standard_normal((rows * cols * merge**2, VALUES)).astype(np.float32) for rows, cols in GRIDS]
    longest = max(map(len, images))
    padded = torch.tensor(np.stack([np.pad(image, ((0, longest - len(image)), (0, 0))) for image in images]))
    visible = torch.arange(longest)[None] < torch.tensor([[len(image)] for image in images])
    with torch.no_grad():
        shapes = torch.tensor(GRIDS) * merge
        expected = model.get_image_features(padded, shapes, visible.long(), return_dict=True)
    table = model.vision_tower.embeddings.position_embedding.weight.detach().numpy().reshape(SIDE, SIDE, -1)
    largest = 2e-5 if kind == FLOAT else 2e-2
    for i, (rows, cols) in enumerate(GRIDS):
        places = cell_positions(table, rows, cols, merge)
        feeds = {"pixel_values": of_cells(images[i], rows, cols, merge), "position_embeds": places}
        found = run(encode, feeds)
        wanted = of_cells(expected.last_hidden_state[i, : len(images[i])].numpy(), rows, cols, merge)
        np.testing.assert_allclose(found, wanted, atol=largest * np.abs(wanted).max())
        connected, wanted = run(connect, {"vision_hidden": found}), expected.pooler_output[i].numpy()
        np.testing.assert_allclose(connected, wanted, atol=largest * np.abs(wanted).max())


def test_a_patch_is_pixel_by_pixel() -> None:
    """Siglip2's order: the channels of a pixel are neighbours."""
    image = np.arange(3 * 8 * 12).reshape(3, 8, 12)
    first = image[:, :PATCH, PATCH : 2 * PATCH].transpose(1, 2, 0).reshape(-1)
    np.testing.assert_array_equal(convert_image_to_patches(image, PATCH)[1], first)


# Equal, up, down, both, lines, and far off.
SIZES = [(16, 16), (17, 16), (20, 31), (4, 7), (15, 33), (1, 1), (1, 40), (40, 2), (128, 3)]


@pytest.mark.parametrize("side", [1, 2, 16])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_interpolation(rows: int, cols: int, side: int) -> None:
    table = np.random.default_rng(2).standard_normal((side, side, 5)).astype(np.float32)
    found = interpolated_positions(table, rows, cols)
    assert found.shape == (rows, cols, 5)
    assert found.dtype == np.float32
    planes = torch.tensor(table).permute(2, 0, 1)[None]
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    resized = torch.nn.functional.interpolate(planes, (rows, cols), **options)
    np.testing.assert_allclose(found, resized[0].permute(1, 2, 0).numpy(), atol=1e-5)
    resize = Siglip2VisionEmbeddings.resize_positional_embeddings
    theirs = resize(torch.tensor(table), torch.tensor([[rows, cols]]), rows * cols)[0]
    np.testing.assert_allclose(found.reshape(-1, 5), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_positions_in_the_order_of_cells(merge: int) -> None:
    table = np.random.default_rng(3).standard_normal((5, 5, 2)).astype(np.float32)
    whole = interpolated_positions(table, 2 * merge, 3 * merge).reshape(-1, 2)
    np.testing.assert_array_equal(cell_positions(table, 2, 3, merge), of_cells(whole, 2, 3, merge))


def test_equal_sizes_change_nothing() -> None:
    table = np.random.default_rng(4).standard_normal((16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(interpolated_positions(table, 16, 16), table)
