"""The tower and merger of Qwen2-VL alone against transformers'."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlConfig, QwenVlTower
from mllm_edge.runtime.prompt.tables import grid_rope
from mllm_edge.spec import GridRope, TensorSpec
from tests.export.towers import DIALECTS, component, opened, randomized, run, saved

MERGE, HIDDEN, TEXT, VALUES, HALF_HEAD = 2, 32, 24, 96, 8


@pytest.mark.parametrize("dialect", DIALECTS)
def test_parity(tmp_path: Path, dialect: str) -> None:
    settings = Qwen2VLVisionConfig(
        depth=2, embed_dim=HIDDEN, hidden_size=TEXT, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=MERGE
    )
    model = randomized(Qwen2VisionTransformerPretrainedModel(settings))
    weights, kernel = saved(model, tmp_path), model.patch_embed.proj.weight.detach().numpy()
    sizes = QwenVlConfig(HIDDEN, 2 * HIDDEN, 2, 2, VALUES, MERGE, 1e-6, settings.hidden_act)
    tables = [TensorSpec(name, "float32", ("cells", MERGE**2, HALF_HEAD)) for name in ("cos", "sin")]
    pixels = TensorSpec("pixel_values", "float32", ("cells", MERGE**2, VALUES))
    seen = TensorSpec("vision_hidden", "float32", ("cells", MERGE**2, HIDDEN))
    features = TensorSpec("image_features", "float32", ("cells", TEXT))
    derived = {"patch_embed.proj.weight": lambda: kernel.reshape(HIDDEN, -1)}
    tower = component("vision_encoder", lambda: QwenVlTower(sizes), (pixels, *tables), seen, derived=derived)
    merger = component("connector", lambda: PatchMerger(sizes, TEXT), (seen,), features, "merger.")
    encode, connect = (opened(part, weights, tmp_path, dialect) for part in (tower, merger))
    random = np.random.default_rng(1)
    for rows, cols in ((1, 1), (3, 5), (6, 2)):
        shown = random.standard_normal((rows * cols, MERGE**2, VALUES)).astype(np.float32)
        with torch.no_grad():
            grid = torch.tensor([[1, rows * MERGE, cols * MERGE]])
            expected = model(torch.tensor(shown).flatten(0, 1), grid_thw=grid)
        cos, sin = grid_rope(GridRope(1e4, 2 * HALF_HEAD), rows, cols, MERGE)
        found = run(encode, {"pixel_values": shown, "cos": cos, "sin": sin})
        wanted = expected.last_hidden_state.unflatten(0, (-1, MERGE**2)).numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
        wanted = expected.pooler_output.numpy()
        np.testing.assert_allclose(run(connect, {"vision_hidden": found}), wanted, atol=2e-5 * np.abs(wanted).max())
