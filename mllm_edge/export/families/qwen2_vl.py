"""Qwen2-VL: images of any size as a grid of cells, positions on three axes, a Qwen2 decoder.

An image is stretched to whole cells of 2 × 2 patches, within bounds on its area; each cell becomes one feature, and in
the prompt the placeholder is repeated once per cell.
"""

from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.qwen_images import (
    END,
    START,
    TEMPLATE,
    VIDEO_DEFAULTS,
    VIDEO_PROCESSOR,
    VISION,
    grid_rope,
    image_features,
    image_spec,
    patch_weights,
    read_patches,
    video_spec,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components

__all__ = ["FAMILY"]


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlConfig, QwenVlTower

    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    patches = read_patches(vision)
    tower, stated = QwenVlConfig.read(vision, patches), vision.take("hidden_size")
    if stated != text_hidden:
        raise ConfigError(f"vision_config: hidden_size {stated}, but the text model's is {text_hidden}", OWN_CONFIG)
    hidden, tables = tower.hidden_size, (grid_rope(vision, tower.hidden_size // tower.heads),)
    video = video_spec(checkpoint, patches, VIDEO_PROCESSOR, VIDEO_DEFAULTS, "stride")
    image = replace(image_spec(checkpoint, patches, tables), video=video)
    traced = cell_components(
        lambda: QwenVlTower(tower),
        lambda: PatchMerger(tower, text_hidden),
        image,
        (hidden, text_hidden),
        (VISION, f"{VISION}merger."),
        patch_weights(checkpoint, patches, hidden),
    )
    return Parts(traced, image, markers=(START, END), images="grid")


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Qwen2VLProcessor", ("Qwen2VLImageProcessor",), TEMPLATE)


FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    decoders=("qwen2",),
    examples=("Qwen/Qwen2-VL-2B-Instruct",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=image_features,
    decoder_type=lambda config, weights: "qwen2_vl_text",
)
