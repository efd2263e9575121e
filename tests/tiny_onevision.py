"""Tiny random LLaVA-OneVision checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mllm_edge.export.checkpoint.processing import for_images
from tests.tiny import Names, make_tokenizer, random_model, save_state_dict

__all__ = ["ONEVISION_TEMPLATE", "save_tiny_onevision"]

ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<global-img>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<end_of_utterance>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_RESOLUTIONS = [[h, w] for h in (48, 96, 144) for w in (48, 96, 144, 192)]


def save_tiny_onevision(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    video_settings: Mapping[str, Any] | None = None,
    template: str | None = ONEVISION_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random LLaVA-OneVision with its processor files to `folder` and return the model in float32.

    The defaults: a SigLIP tower of 48 px and 8 px patches with 3 layers, a Qwen2 with 2, hidden sizes 64; up to 12
    tiles, of whose features 4 tiles' worth are kept.
    """
    tokenizer = make_tokenizer()
    made = _config(tokenizer, text, vision, config)
    model = random_model(LlavaOnevisionForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    settings = {"size": {"height": side, "width": side}, "image_grid_pinpoints": made.image_grid_pinpoints}
    processor = for_images(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(**{**settings, **(image_settings or {})}),
        tokenizer,
        num_image_tokens=(side // made.vision_config.patch_size) ** 2,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        vision_aspect_ratio=made.vision_aspect_ratio,
        video_token="<global-img>",
        chat_template=template,
    )
    processor.save_pretrained(folder)
    if video_settings is not None:
        settings = {"size": settings["size"], **video_settings}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> LlavaOnevisionConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048}
    tower = {"num_hidden_layers": 3, "image_size": 48, "patch_size": 8, "vision_use_head": False}
    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **sizes, **decoder, **(text or {})},
        vision_config={"model_type": "siglip_vision_model", **sizes, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<global-img>"),
        **{"image_grid_pinpoints": _RESOLUTIONS, "vision_aspect_ratio": "anyres_max_4", **(config or {})},
    )
