"""LLaVA-NeXT (1.6): CLIP or SigLIP tower, two-layer connector, images as tiles behind an overview.

Every image is fitted into the best of some resolutions and cut; its features lose what shows padding, and end each row
with a learned one.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import require_switched_on, require_tile
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import (
    NEWLINE,
    TEMPLATE,
    LlavaVision,
    drops_first,
    newline_array,
    read_llava_processor,
    read_resolutions,
    read_vision,
    require_square,
    stated_tokens,
    tapped_states,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.spec import ImagePrompt, ImageSpec, RowEnd, SelectResolution, Unpad

__all__ = ["FAMILY", "image_features", "image_spec", "packed_tiles", "pixel_values"]

# For checkpoints that come without a template, by their text model: Mistral's form, and for others Vicuna's.
_MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ ' [/INST]' if add_generation_prompt or not loop.last else '' }}"
    "{% elif message['role'] == 'assistant' %}{{ eos_token }}{{ ' ' }}"
    "{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    top = checkpoint.top
    seen = read_vision(checkpoint, drops_first(checkpoint), bias=bool(top.take("multimodal_projector_bias")))
    top.take("image_seq_length")  # neither the reference's model nor its processor reads it
    traced, image = seen.components(checkpoint), image_spec(checkpoint, seen)
    return Parts(traced, image, seen.ignored(checkpoint), arrays=newline_array(checkpoint))


def _load_processor(source: Source) -> Any:
    text = source.config.get("text_config") or {}
    template = _MISTRAL if text.get("model_type") == "mistral" else TEMPLATE
    return read_llava_processor(source, "LlavaNextProcessor", ("LlavaNextImageProcessor",), template)


def image_spec(checkpoint: Checkpoint, seen: LlavaVision, *reserved: str) -> ImageSpec:
    """Images as tiles behind an overview; `reserved`: see `ImagePrompt`. Raises ConfigError where the image processor
    makes others than the tower sees."""
    require_square(checkpoint, seen)
    found = packed_tiles(checkpoint, seen.tile, seen.tokens, *reserved)
    stated_tokens(checkpoint, seen.tile, seen.tokens)
    return found


def packed_tiles(checkpoint: Checkpoint, tile: int, tokens: int, *reserved: str) -> ImageSpec:
    """As `image_spec`, for tiles of so many features."""
    source, processor = checkpoint.source, checkpoint.processor
    settings, resolutions = processor.image_processor, read_resolutions(checkpoint, tile)
    require_switched_on(source, settings, "do_convert_rgb")
    size, crop = settings.size, settings.crop_size
    overview = (size.height, size.width) if size.height and size.width else (size.shortest_edge,) * 2
    require_tile(source, overview if all(overview) else None, tile)
    require_tile(source, (crop.height, crop.width) if crop and crop.height else overview, tile)
    return ImageSpec(
        (SelectResolution(resolutions, tile, resample_name(settings.resample)), *value_transforms(settings)),
        ImagePrompt(processor.image_token, checkpoint.token_id, "{image}", reserved=reserved),
        tile,
        tile,
        tokens,
        pack=(Unpad(), RowEnd(NEWLINE)),
    )


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """See `Family`."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    skip = model.config.vision_feature_select_strategy == "default"
    return tapped_states(model, found, skip), torch.cat(list(found.pooler_output))


def pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Without the zeros that fill images of few tiles up to those of the others."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, tile = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    tiles = [image_size_to_num_patches(size, pinpoints, tile) for size in inputs["image_sizes"]]
    return torch.cat([image[:n] for image, n in zip(inputs["pixel_values"], tiles, strict=True)])


FAMILY = Family(
    name="llava_next",
    model_types=("llava_next",),
    decoders=("llama", "mistral", "qwen2"),
    examples=("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=image_features,
    pixel_values=pixel_values,
    image_token="image_token_index",
    translated=with_text_config,
)
