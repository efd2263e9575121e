"""Tiny random checkpoints of LLaVA's successors over CLIP: ViP-LLaVA, LLaVA-NeXT, and those of both for videos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from mllm_edge.export.checkpoint.processing import for_images
from tests.tiny import LLAVA_TEMPLATE, Names, as_on_the_hub, make_tokenizer, random_model, save_state_dict

__all__ = [
    "MISTRAL_TEMPLATE",
    "VIDEO_TOKEN",
    "save_tiny_llava_next",
    "save_tiny_llava_next_video",
    "save_tiny_video_llava",
    "save_tiny_vipllava",
]

VIDEO_TOKEN = "<global-img>"

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '<end_of_utterance> ' }}{% endif %}{% endfor %}"
)
_VIDEO_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<global-img>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_RESOLUTIONS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]


def save_tiny_vipllava(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = LLAVA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random ViP-LLaVA with its processor files to `folder` and return the model in float32.

    The defaults: a CLIP tower of 48 px and 8 px patches with 3 layers, three of whose states are seen, a Llama with 2,
    hidden sizes 64.
    """
    tokenizer = make_tokenizer()
    made = _config(VipLlavaConfig, tokenizer, text, vision, {"vision_feature_layer": [-2, 1, -1], **(config or {})})
    model = random_model(VipLlavaForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = CLIPImageProcessorPil(**{**sizes, **(image_settings or {})})
    processor = LlavaProcessor(images, tokenizer, **_tokens(made, "default"), chat_template=template)
    processor.save_pretrained(folder)
    _rename(folder, names, model, processor)
    return model


def save_tiny_llava_next(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = MISTRAL_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random LLaVA-NeXT with its processor files to `folder` and return the model in float32.

    The defaults: a CLIP tower of 48 px and 8 px patches with 3 layers, a Mistral with 2, hidden sizes 64, up to 2 × 2
    or 3 tiles behind the overview.
    """
    tokenizer = make_tokenizer()
    made = _config(
        LlavaNextConfig,
        tokenizer,
        {"model_type": "mistral", **(text or {})},
        vision,
        {"image_grid_pinpoints": _RESOLUTIONS, **(config or {})},
    )
    model = random_model(LlavaNextForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {**sizes, "image_grid_pinpoints": made.image_grid_pinpoints, **(image_settings or {})}
    tokens = _tokens(made, made.vision_feature_select_strategy)
    processor = LlavaNextProcessor(LlavaNextImageProcessorPil(**settings), tokenizer, **tokens, chat_template=template)
    processor.save_pretrained(folder)
    _rename(folder, names, model, processor)
    return model


def save_tiny_llava_next_video(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    video_settings: Mapping[str, Any] | None = {},
    template: str | None = _VIDEO_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random LLaVA-NeXT-Video with its processor files to `folder` and return the model in float32; sizes as
    `save_tiny_llava_next`, a Llama. `video_settings` None: without those of a video processor."""
    tokenizer = make_tokenizer()
    made = _config(
        LlavaNextVideoConfig,
        tokenizer,
        text,
        vision,
        {"image_grid_pinpoints": _RESOLUTIONS, "video_token_index": _video_id(tokenizer), **(config or {})},
    )
    model = random_model(LlavaNextVideoForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {**sizes, "image_grid_pinpoints": made.image_grid_pinpoints, **(image_settings or {})}
    processor = for_images(LlavaNextVideoProcessor)(
        image_processor=LlavaNextImageProcessorPil(**settings),
        tokenizer=tokenizer,
        **_tokens(made, made.vision_feature_select_strategy),
        video_token=VIDEO_TOKEN,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    _rename(folder, names, model, processor)
    if names != "hub":  # there the image processor's settings count
        _save_video_settings(folder, sizes, video_settings)
    return model


def save_tiny_video_llava(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    video_settings: Mapping[str, Any] | None = {},
    template: str | None = _VIDEO_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Video-LLaVA with its processor files to `folder` and return the model in float32.

    The defaults: CLIP towers of 48 px and 8 px patches with 3 layers, one for images and one for videos, a Llama with
    2, hidden sizes 64. `video_settings` None: without those of a video processor.
    """
    tokenizer = make_tokenizer()
    videos = {"video_token_index": _video_id(tokenizer)}
    made = _config(VideoLlavaConfig, tokenizer, text, vision, {**videos, **(config or {})})
    model = random_model(VideoLlavaForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = for_images(VideoLlavaProcessor)(
        image_processor=VideoLlavaImageProcessor(**{**sizes, **(image_settings or {})}),
        tokenizer=tokenizer,
        **_tokens(made, made.vision_feature_select_strategy),
        video_token=VIDEO_TOKEN,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    _rename(folder, names, model, processor)
    if names != "hub":  # there the image processor's settings count
        _save_video_settings(folder, sizes, video_settings)
    return model


def _video_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return int(tokenizer.convert_tokens_to_ids(VIDEO_TOKEN))


def _save_video_settings(folder: Path, sizes: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    if settings is not None:
        stated = json.dumps({**sizes, **settings})
        (folder / "video_preprocessor_config.json").write_text(stated, encoding="utf-8")


def _tokens(config: Any, strategy: str) -> dict[str, Any]:
    """What a processor counts an image's tokens by."""
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(config.vision_config.model_type == "clip_vision_model"),
    }


def _rename(folder: Path, names: Names, model: Any, processor: Any) -> None:
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        as_on_the_hub(folder, processor)


def _config(
    cls: Any,
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> Any:
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048}
    tower = {"num_hidden_layers": 3, "image_size": 48, "patch_size": 8}
    return cls(
        text_config={"model_type": "llama", **_SIZES, **decoder, **(text or {})},
        vision_config={"model_type": "clip_vision_model", **_SIZES, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **config,
    )
