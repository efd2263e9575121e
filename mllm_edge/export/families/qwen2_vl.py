"""Qwen2-VL: images of any size as a grid of cells, positions on three axes, a Qwen2 decoder.

An image is stretched to whole cells of 2 × 2 patches, within bounds on its area; each cell becomes one feature, and in
the prompt the placeholder is repeated once per cell.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.qwen_images import END, START, TEMPLATE, grid_rope, image_spec, read_patches
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components

__all__ = ["FAMILY"]

_VISION = "model.visual."


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlConfig, QwenVlTower

    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    patches = read_patches(vision)
    tower, stated = QwenVlConfig.read(vision, patches), vision.take("hidden_size")
    if stated != text_hidden:
        raise ConfigError(f"vision_config: hidden_size {stated}, but the text model's is {text_hidden}", OWN_CONFIG)
    hidden, tables = tower.hidden_size, (grid_rope(vision, tower.hidden_size // tower.heads),)
    for unused in ("video_token_id", "vision_start_token_id", "vision_end_token_id"):  # the template names them
        checkpoint.top.take(unused)
    image = image_spec(checkpoint, patches, tables)
    # A convolution over patches that do not overlap is a linear layer over flattened ones.
    sides = (3, patches.frames, patches.patch, patches.patch)
    convolution = checkpoint.weights.use(f"{_VISION}patch_embed.proj.weight", (hidden, *sides))
    traced = cell_components(
        lambda: QwenVlTower(tower),
        lambda: PatchMerger(tower, text_hidden),
        image,
        (hidden, text_hidden),
        (_VISION, f"{_VISION}merger."),
        {"patch_embed.proj.weight": lambda: convolution().reshape(hidden, -1)},
    )
    return Parts(traced, image, markers=(START, END), images="grid")


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Qwen2VLProcessor", ("Qwen2VLImageProcessor",), TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    cell = model.config.vision_config.spatial_merge_size**2
    return found.last_hidden_state.unflatten(0, (-1, cell)), torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    decoders=("qwen2",),
    examples=("Qwen/Qwen2-VL-2B-Instruct",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    decoder_type=lambda config, weights: "qwen2_vl_text",
)
