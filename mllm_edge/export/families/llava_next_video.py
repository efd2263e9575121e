"""LLaVA-NeXT-Video: images as LLaVA-NeXT has them, and videos, of whose frames a quarter of the features is left.

The means of neighbours are taken before the connector, which is no linear map: videos have a connector of their own,
with the same weights.
"""

from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_next import image_features, image_spec, pixel_values
from mllm_edge.export.families.llava_parts import (
    TEMPLATE,
    VIDEO_NOTE,
    LlavaVision,
    drops_first,
    newline_array,
    read_llava_processor,
    read_video_spec,
    read_vision,
    tapped_states,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.spec import VideoSpec

__all__ = ["FAMILY"]

_POOL = 2  # fixed in the processor, which counts a frame's tokens


def _describe(checkpoint: Checkpoint) -> Parts:
    top = checkpoint.top
    seen = read_vision(checkpoint, drops_first(checkpoint), bias=bool(top.take("multimodal_projector_bias")))
    for unused in ("image_seq_length", "video_seq_length"):  # neither the reference's model nor its processor reads it
        top.take(unused)
    top.require("spatial_pool_mode", "average")
    top.require("spatial_pool_stride", _POOL)
    image = image_spec(checkpoint, seen, checkpoint.processor.video_token)
    video = _video_spec(checkpoint, seen)
    return Parts(
        _components(checkpoint, seen, video),
        replace(image, video=video),
        seen.ignored(checkpoint),
        arrays=newline_array(checkpoint),
    )


def _components(checkpoint: Checkpoint, seen: LlavaVision, video: VideoSpec | None) -> tuple[TracedComponent, ...]:
    encoder, connector = seen.components(checkpoint)
    if video is None:
        return encoder, connector
    _, of_images = seen.components(checkpoint, "image")
    _, of_videos = seen.components(checkpoint, "video", pool=_POOL)
    return encoder, of_images, of_videos


def _video_spec(checkpoint: Checkpoint, seen: LlavaVision) -> VideoSpec | None:
    video = read_video_spec(checkpoint, "LlavaNextVideoVideoProcessor", seen.tile, seen.tokens // _POOL**2)
    if video is not None and seen.tower.patches % _POOL:
        raise ConfigError(
            f"config.json: spatial_pool_stride = {_POOL}, and the tower has {seen.tower.patches} patches a side: the "
            "reference makes other tokens of a frame than it counts",
            "only an even number of patches is supported",
        )
    return video


def _load_processor(source: Source) -> Any:
    return read_llava_processor(source, "LlavaNextVideoProcessor", ("LlavaNextImageProcessor",), TEMPLATE)


def _video_features(model: Any, pixel_values: Any) -> tuple[Any, Any]:
    found = model.model.get_video_features(pixel_values[None], return_dict=True)
    skip = model.config.vision_feature_select_strategy == "default"
    return tapped_states(model, found, skip), found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="llava_next_video",
    model_types=("llava_next_video",),
    decoders=("llama", "mistral"),
    examples=("llava-hf/LLaVA-NeXT-Video-7B-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=image_features,
    pixel_values=pixel_values,
    video_features=_video_features,
    note=VIDEO_NOTE,
    image_token="image_token_index",
    translated=with_text_config,
)
