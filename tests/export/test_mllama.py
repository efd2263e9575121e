"""The tower and projector of Llama 3.2 Vision against transformers'."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from mllm_edge.errors import ConfigError
from mllm_edge.export.vision.mllama import MllamaConfig, MllamaTower, mllama_derived
from mllm_edge.export.vision.modules import Linear
from mllm_edge.spec import TensorSpec
from tests.export.towers import DIALECTS, FLOAT, HALF, component, opened, randomized, reader, run, saved

PATCH, HIDDEN, TILES, TEXT = 4, 32, 4, 24


def config(side: int = 3, taps: tuple[int, ...] = (2, 0), **settings: object) -> MllamaVisionConfig:
    """Tiles of side × side patches."""
    return MllamaVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_global_layers=2,
        attention_heads=2,
        image_size=side * PATCH,
        patch_size=PATCH,
        intermediate_layers_indices=list(taps),
        vision_output_dim=HIDDEN * (1 + len(taps)),
        **settings,
    )


def model_of(settings: MllamaVisionConfig) -> torch.nn.Module:
    """The tower and the projector, by their names in a checkpoint."""
    torch.manual_seed(0)
    parts = {
        "vision_model": MllamaVisionModel(settings),
        "multi_modal_projector": torch.nn.Linear(settings.vision_output_dim, TEXT),
    }
    return randomized(torch.nn.ModuleDict(parts))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (config(), FLOAT),
        (config(side=2, taps=(1,)), FLOAT),
        (config(side=5, taps=(-1, 1, 0)), FLOAT),
        (config(max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]], norm_eps=1e-2), FLOAT),
        (config(), HALF),
    ],
    ids=["six pad", "three pad", "from behind", "two tiles", "half"],
)
def test_parity(tmp_path: Path, dialect: str, settings: MllamaVisionConfig, kind: ir.DataType) -> None:
    model = model_of(settings)
    weights, sizes = saved(model, tmp_path), MllamaConfig.read(reader(settings))
    shape = (sizes.tiles, 3, sizes.tile, sizes.tile)
    inputs = (TensorSpec("pixel_values", "float32", shape), TensorSpec("aspect_ratio_id", "int64", (1,)))
    seen = TensorSpec("vision_hidden", "float32", (sizes.tiles, sizes.patches, sizes.width))
    derived = mllama_derived(sizes, weights, "vision_model.")
    tower = component("vision_encoder", lambda: MllamaTower(sizes), inputs, seen, "vision_model.", derived)
    states = TensorSpec("encoder_hidden_states", "float32", (sizes.tiles, sizes.patches, TEXT))
    projector = component(
        "connector", lambda: Linear(sizes.width, TEXT), (seen,), states, prefix="multi_modal_projector."
    )
    encode, connect = (opened(part, weights, tmp_path, dialect, kind) for part in (tower, projector))
    assert not weights.unused()

    random, largest = np.random.default_rng(1), 2e-5 if kind == FLOAT else 2e-2
    for place, (rows, cols) in enumerate(sizes.aspect_ratios):
        tiles = rows * cols
        pixels = random.standard_normal(shape).astype(np.float32)
        pixels[tiles:] = 0
        mask = (torch.arange(sizes.tiles) < tiles).long()
        with torch.no_grad():
            found = model["vision_model"](
                torch.tensor(pixels)[None, None], torch.tensor([[place + 1]]), mask[None, None]
            )
            expected = found.last_hidden_state[0, 0]
            projected = model["multi_modal_projector"](expected).numpy()
        hidden = run(encode, {"pixel_values": pixels, "aspect_ratio_id": np.array([place + 1])})
        np.testing.assert_allclose(hidden, expected.numpy(), atol=largest * np.abs(expected.numpy()).max())
        connected = run(connect, {"vision_hidden": hidden})
        np.testing.assert_allclose(connected, projected, atol=largest * np.abs(projected).max())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_output_dim": 64}, "vision_output_dim 64, but the last layer's and 2 further states make 96"),
        ({"intermediate_layers_indices": [2, 3]}, r"intermediate_layers_indices \[2, 3\] of 3 layers"),
        ({"intermediate_layers_indices": []}, r"intermediate_layers_indices \[\] of 3 layers"),
        ({"supported_aspect_ratios": [[1, 1], [2, 3]]}, "supported_aspect_ratios need more than 4 tiles"),
    ],
)
def test_settings_that_contradict(change: dict[str, object], reason: str) -> None:
    settings = config()
    for key, value in change.items():
        setattr(settings, key, value)
    with pytest.raises(ConfigError, match=reason):
        MllamaConfig.read(reader(settings))
