"""Video-LLaVA: a CLIP tower for images and another for the frames of videos, one connector for both.

An image is one square tile, and so is each frame. Of frames all features are tokens, the class token's too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.export.checkpoint.processor import require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import (
    TEMPLATE,
    VIDEO_NOTE,
    clip_like,
    drops_first,
    read_llava_processor,
    read_video_spec,
    read_vision,
    single_image_spec,
    tapped_states,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts

__all__ = ["FAMILY"]

_IMAGES, _VIDEOS = "model.image_tower.", "model.video_tower."
_PIXELS = "pixel_values_images"  # what transformers' image processor calls its pixels


def _describe(checkpoint: Checkpoint) -> Parts:
    top, processor = checkpoint.top, checkpoint.processor
    of_images = read_vision(checkpoint, drops_first(checkpoint), bias=bool(top.take("multimodal_projector_bias")))
    of_videos = replace(of_images, taps=replace(of_images.taps, skip=0))
    for unused in ("image_seq_length", "video_seq_length"):  # neither the reference's model nor its processor reads it
        top.take(unused)
    images = clip_like(vars(processor.image_processor))
    image = single_image_spec(checkpoint, of_images.tile, of_images.tokens, images, processor.video_token)
    video = read_video_spec(checkpoint, "VideoLlavaVideoProcessor", of_videos.tile, of_videos.tokens)
    ignored = of_images.ignored(checkpoint, _IMAGES)
    if video is None:
        return Parts(of_images.components(checkpoint, tower=_IMAGES), image, (*ignored, _VIDEOS))
    stated = (of_videos.tile // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    settings = "patch_size and num_additional_image_tokens"
    require_tokens(checkpoint.source, f"{settings} give {stated} tokens for a frame", stated, of_videos.tokens)
    towers = (
        *of_images.components(checkpoint, "image", _IMAGES),
        *of_videos.components(checkpoint, "video", _VIDEOS),
    )
    return Parts(towers, replace(image, video=video), (*ignored, *of_videos.ignored(checkpoint, _VIDEOS)))


def _load_processor(source: Source) -> Any:
    return read_llava_processor(source, "VideoLlavaProcessor", ("VideoLlavaImageProcessor",), TEMPLATE)


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    return inputs[_PIXELS]


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs[_PIXELS], return_dict=True)
    skip = model.config.vision_feature_select_strategy == "default"
    return tapped_states(model, found, skip), found.pooler_output.flatten(0, 1)


def _video_features(model: Any, pixel_values: Any) -> tuple[Any, Any]:
    found = model.model.get_video_features(pixel_values[None], return_dict=True)
    return tapped_states(model, found, skip=False), found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="video_llava",
    model_types=("video_llava",),
    decoders=("llama",),
    examples=("LanguageBind/Video-LLaVA-7B-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    video_features=_video_features,
    note=VIDEO_NOTE,
    image_token="image_token_index",
    translated=with_text_config,
)
