"""LLaVA-OneVision: SigLIP tower, two-layer connector, images as tiles behind an overview, packed into rows of features.

One image alone is fitted into the best of many resolutions and cut; its features lose what shows padding, shrink where
they are many, and end each row with a learned one. Of several images each is one square tile. So is each frame of a
video, a quarter of whose features is left.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.video_settings import frame_sampling, frame_tiles, video_settings
from mllm_edge.export.families.llava_parts import (
    NEWLINE,
    SIGLIP,
    newline_array,
    read_resolutions,
    read_vision,
    tapped_states,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.spec import (
    ImagePrompt,
    ImageSpec,
    PadToSquare,
    Resize,
    RowEnd,
    SelectResolution,
    Shrink,
    Unpad,
    VideoSpec,
)

__all__ = ["FAMILY"]

_ANYRES = "anyres_max_"
_VIDEO_TOKEN = "video_token_index"
# For checkpoints that come without a template: images first, then videos, a blank behind the role.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    checkpoint.top.require("vision_feature_select_strategy", "full")
    bias = bool(checkpoint.top.take("multimodal_projector_bias"))
    seen = read_vision(checkpoint, skip=False, towers=(SIGLIP,), bias=bias)
    traced, image = seen.components(checkpoint), _image_spec(checkpoint, seen.tile, seen.tokens)
    return Parts(traced, image, seen.ignored(checkpoint), arrays=newline_array(checkpoint))


def _load_processor(source: Source) -> Any:
    config = source.config
    side = config.get("vision_config", {})
    patches = (side.get("image_size") or 384) // (side.get("patch_size") or 14)
    return load_processor(
        source,
        "LlavaOnevisionProcessor",
        ("LlavaOnevisionImageProcessor",),
        _TEMPLATE,
        lambda _: {
            "num_image_tokens": patches**2,
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "full"),
        },
    )


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    given = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    found = model.model.get_image_features(**given, return_dict=True, output_hidden_states=True)
    return tapped_states(model, found, skip=False), torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings, resolutions = processor.image_processor, read_resolutions(checkpoint, tile)
    require_switched_on(source, settings, "do_convert_rgb", "do_resize")
    require_tile(source, None if settings.do_center_crop else (settings.size.height, settings.size.width), tile)
    require_tokens(source, f"num_image_tokens = {processor.num_image_tokens}", processor.num_image_tokens, tokens)
    resample, values = resample_name(settings.resample), value_transforms(settings)
    background = PadToSquare(tuple(int(value * 255) for value in settings.image_mean))
    return ImageSpec(
        (SelectResolution(resolutions, tile, resample), *values),
        ImagePrompt(processor.image_token, checkpoint.token_id, "{image}", reserved=(processor.video_token,)),
        tile,
        tile,
        tokens,
        pack=(Unpad(), Shrink(_most_tiles(checkpoint)), RowEnd(NEWLINE)),
        several=(background, Resize(tile, tile, resample), *values),
        video=_video_spec(checkpoint, tile),
    )


def _video_spec(checkpoint: Checkpoint, tile: int) -> VideoSpec | None:
    """Each frame is stretched to one tile; the newline stands behind the last one's features. None for a folder without
    settings of a video processor, which transformers does not open for videos either."""
    source, token, token_id = checkpoint.source, checkpoint.processor.video_token, checkpoint.top.take(_VIDEO_TOKEN)
    settings = video_settings(source, "LlavaOnevisionVideoProcessor", size={"height": 384, "width": 384})
    if settings is None:
        return None
    sampling = frame_sampling(source, settings)
    return VideoSpec(frame_tiles(source, settings, tile), token, token_id, NEWLINE, sampling=sampling)


def _most_tiles(checkpoint: Checkpoint) -> int:
    """How many tiles' worth of features an image may have."""
    word = str(checkpoint.top.take("vision_aspect_ratio"))
    number = word.removeprefix(_ANYRES)
    if word == number or not number.isdecimal() or not int(number):
        raise ConfigError(f"config.json: vision_aspect_ratio = {word!r}", f"supported: {_ANYRES}N, such as {_ANYRES}9")
    if checkpoint.processor.vision_aspect_ratio != word:
        stated = checkpoint.processor.vision_aspect_ratio
        raise ConfigError(
            f"{checkpoint.source.folder}: vision_aspect_ratio of the processor is {stated!r}, the model's {word!r}",
            "use the processor files that belong to this model",
        )
    return int(number)


FAMILY = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    decoders=("qwen2",),
    examples=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
)
