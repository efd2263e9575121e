"""Qwen2.5-VL: Qwen2-VL's images, a tower most of whose layers look at windows only, a Qwen2 decoder."""

from collections.abc import Mapping
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
    image_spec,
    patch_weights,
    read_patches,
    video_spec,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.spec import GridWindows

__all__ = ["FAMILY"]


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.qwen25_vl import Qwen25VlConfig, Qwen25VlTower, qwen25_merger

    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    patches, tower = read_patches(vision), Qwen25VlConfig.read(vision)
    sizes, stated = tower.sizes, vision.take("out_hidden_size")
    if stated != text_hidden:
        raise ConfigError(f"vision_config: out_hidden_size {stated}, but the text model's is {text_hidden}", OWN_CONFIG)
    rate = float(vision.take("tokens_per_second"))
    video = video_spec(checkpoint, patches, VIDEO_PROCESSOR, VIDEO_DEFAULTS, "stride", rate=rate)
    tables = (grid_rope(vision, sizes.hidden_size // sizes.heads), GridWindows(tower.side))
    image = replace(image_spec(checkpoint, patches, tables), video=video)
    traced = cell_components(
        lambda: Qwen25VlTower(tower),
        lambda: qwen25_merger(tower, text_hidden),
        image,
        (sizes.hidden_size, text_hidden),
        (VISION, f"{VISION}merger."),
        patch_weights(checkpoint, patches, sizes.hidden_size),
    )
    return Parts(traced, image, markers=(START, END), images="grid")


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Qwen2_5_VLProcessor", ("Qwen2VLImageProcessor",), TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tower's patches in the image's order; transformers leaves them in that of the windows."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    grid, settings = inputs["image_grid_thw"], model.config.vision_config
    found = model.model.get_image_features(inputs["pixel_values"], grid, return_dict=True)
    merge, window, patch = settings.spatial_merge_size, settings.window_size, settings.patch_size
    order = get_vision_window_index(grid, merge, window, patch)[0]
    cells = found.last_hidden_state.unflatten(0, (-1, merge**2))
    return cells[order.argsort()], torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    decoders=("qwen2",),
    examples=("Qwen/Qwen2.5-VL-3B-Instruct", "microsoft/Fara-7B"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    decoder_type=lambda config, weights: "qwen2_vl_text",
)
