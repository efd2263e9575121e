"""TensorRT builds the towers of cells, windows and tiles."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlModel
from transformers.models.mllama.modeling_mllama import MllamaVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.vision.mllama import MllamaConfig, MllamaTower, mllama_derived
from mllm_edge.export.vision.qwen25_vl import Qwen25VlConfig, Qwen25VlTower
from mllm_edge.export.vision.siglip2 import Siglip2Tower, read_siglip2
from mllm_edge.runtime.backends.tensorrt_build import Range, build, check_network
from mllm_edge.spec import TensorSpec
from tests.export import test_mllama, test_qwen3_vl, test_qwen25_vl, test_siglip2
from tests.export.towers import HALF, component, opened, randomized, reader, saved

# Least, usual and most: one cell in one window, 4 × 6 cells in windows of 3 × 3, 8 × 8.
RANGES = {"cells": (1, 24, 64), "windows": (1, 4, 9)}


def qwen25_vl(folder: Path) -> tuple[TracedComponent, Weights]:
    settings = test_qwen25_vl.config(full=(1, 3), depth=4)
    model, sizes = randomized(Qwen2_5_VisionTransformerPretrainedModel(settings)), Qwen25VlConfig.read(reader(settings))
    cell, values, hidden = sizes.sizes.merge**2, sizes.sizes.patch_values, sizes.sizes.hidden_size
    window, turned = sizes.side**2 * cell, hidden // sizes.sizes.heads // 2
    inputs = (
        TensorSpec("pixel_values", "float32", ("cells", cell, values)),
        TensorSpec("cos", "float32", ("cells", cell, turned)),
        TensorSpec("sin", "float32", ("cells", cell, turned)),
        TensorSpec("window_index", "int64", ("windows", sizes.side**2)),
        TensorSpec("window_bias", "float32", ("windows", 1, window, window)),
        TensorSpec("cell_index", "int64", ("cells",)),
    )
    kernel = model.patch_embed.proj.weight.detach().numpy()
    derived = {"patch_embed.proj.weight": lambda: kernel.reshape(hidden, -1)}
    seen = TensorSpec("vision_hidden", "float32", ("cells", cell, hidden))
    tower = component("vision_encoder", lambda: Qwen25VlTower(sizes), inputs, seen, derived=derived)
    return tower, saved(model, folder)


def qwen3_vl(folder: Path) -> tuple[TracedComponent, Weights]:
    """With the features of some layers beside the last one's."""
    settings = test_qwen3_vl.config()
    model = randomized(Qwen3VLVisionModel(settings))
    return test_qwen3_vl.parts(model, settings)[0], saved(model, folder)


def mllama(folder: Path) -> tuple[TracedComponent, Weights]:
    settings = test_mllama.config()
    weights, sizes = saved(randomized(MllamaVisionModel(settings)), folder), MllamaConfig.read(reader(settings))
    pixels = TensorSpec("pixel_values", "float32", (sizes.tiles, sizes.channels, sizes.tile, sizes.tile))
    inputs = (pixels, TensorSpec("aspect_ratio_id", "int64", (1,)))
    seen = TensorSpec("vision_hidden", "float32", (sizes.tiles, sizes.patches, sizes.width))
    derived = mllama_derived(sizes, weights, "")
    return component("vision_encoder", lambda: MllamaTower(sizes), inputs, seen, derived=derived), weights


def siglip2(folder: Path) -> tuple[TracedComponent, Weights]:
    settings = test_siglip2.config()
    weights, cell = saved(randomized(Lfm2VlModel(settings)), folder), settings.downsample_factor**2
    sizes = read_siglip2(reader(settings.vision_config))
    inputs = (
        TensorSpec("pixel_values", "float32", ("cells", cell, test_siglip2.VALUES)),
        TensorSpec("position_embeds", "float32", ("cells", cell, sizes.hidden_size)),
    )
    seen = TensorSpec("vision_hidden", "float32", ("cells", cell, sizes.hidden_size))
    merge = settings.downsample_factor
    return component("vision_encoder", lambda: Siglip2Tower(sizes, merge), inputs, seen, "vision_tower."), weights


@pytest.mark.parametrize("dialect", ["opset24", "opset17"])
@pytest.mark.parametrize("tower", [qwen25_vl, qwen3_vl, mllama, siglip2], ids=lambda tower: tower.__name__)
def test_tensorrt_builds_the_tower(
    tmp_path: Path, dialect: str, tower: Callable[[Path], tuple[TracedComponent, Weights]]
) -> None:
    torch.manual_seed(0)
    part, weights = tower(tmp_path)
    opened(part, weights, tmp_path, dialect, HALF)
    path = tmp_path / f"{part.name}.onnx"
    check_network(path, 0)
    assert build(path, [ranges(part)], ["SM80", "SM86", "SM89", "SM120"]).nbytes > 0


def ranges(part: TracedComponent) -> dict[str, Range]:
    """The smallest, usual and largest shape of each input."""

    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else RANGES[n][which] for n in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in part.inputs}
