"""Tiny random Aya Vision checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["AYA_TEMPLATE", "save_tiny_aya_vision"]

_PATCH = "<|IMG_PATCH|>"
_IMAGE = (_PATCH, "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE", "TILE_GLOBAL")
_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|USER_TOKEN|>' if message['role'] == 'user' else '<|CHATBOT_TOKEN|>' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)


def save_tiny_aya_vision(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = AYA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Aya Vision with its processor files to `folder` and return the model in float32.

    The defaults: a SigLIP of 48 px and 8 px patches with 2 layers, 9 tokens of a tile, up to 4 tiles, hidden sizes 64;
    a decoder with 2 layers, the first with a window of 24.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<BOS>", "<EOS>", *_IMAGE, *_TURNS),
        bos_token="<BOS>",
        eos_token="<EOS>",
        pad_token="<EOS>",
        extra_special_tokens=[*_IMAGE, *_TURNS],
    )
    made = AyaVisionConfig(**_config(tokenizer, text, vision, config))
    model = random_model(AyaVisionForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    size = {"size": {"height": tower.image_size, "width": tower.image_size}, "max_patches": 4}
    AyaVisionProcessor(
        GotOcr2ImageProcessorPil(**{**size, **(image_settings or {})}),
        tokenizer,
        patch_size=tower.patch_size,
        img_size=tower.image_size,
        downsample_factor=made.downsample_factor,
        chat_template=template,
    ).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    count = (text or {}).get("num_hidden_layers", sizes["num_hidden_layers"])
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(count)]
    layers = {"sliding_window": 24, "layer_types": kinds, "logit_scale": 0.5}
    decoder = {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, **layers}
    tower = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    return {
        "text_config": {"model_type": "cohere2", **sizes, **decoder, **(text or {})},
        "vision_config": {"model_type": "siglip_vision_model", **sizes, **tower, **(vision or {})},
        "image_token_index": tokenizer.convert_tokens_to_ids(_PATCH),
        **{"tie_word_embeddings": True, **(config or {})},
    }
