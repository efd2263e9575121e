"""Tiny random checkpoints with Pixtral's tower: Mistral 3 and LightOnOCR."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from mllm_edge.export.families.mistral3 import pixtral_processor
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_lighton_ocr", "save_tiny_mistral3"]

_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '[IMG]' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '[/INST]' }}{% endfor %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_DECODER = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
_TOWER = {"model_type": "pixtral", **_SIZES, "num_hidden_layers": 3, "patch_size": 8, "image_size": 96}


def save_tiny_mistral3(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = _MISTRAL_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Mistral 3 with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, 2 × 2 of them a feature, images of up to 96 px, 3 + 2 layers, hidden sizes 64.
    """
    core = byte_tokenizer("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    configuration = Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 16, **_SIZES, **_DECODER, **(text or {})},
        vision_config={**_TOWER, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        **{"tie_word_embeddings": False, **(config or {})},
    )
    model = random_model(Mistral3ForConditionalGeneration, configuration, tokenizer, seed)
    return _saved(folder, model, pixtral_processor(), tokenizer, image_settings, template, names, shard_size)


def save_tiny_lighton_ocr(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = _QWEN_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """The same of LightOnOCR; sides of images are multiples of one patch."""
    special = {f"image{part}_token": f"<|{name}|>" for part, name in _LIGHTON.items()}
    core = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special.values())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    configuration = LightOnOcrConfig(
        text_config={"model_type": "qwen3", "head_dim": 16, **_SIZES, **_DECODER, **(text or {})},
        vision_config={**_TOWER, "hidden_act": "silu", **(vision or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        **{"tie_word_embeddings": False, **(config or {})},
    )
    model = random_model(LightOnOcrForConditionalGeneration, configuration, tokenizer, seed)
    return _saved(folder, model, LightOnOcrProcessor, tokenizer, image_settings, template, names, shard_size)


_LIGHTON = {"": "image_pad", "_break": "vision_pad", "_end": "vision_end"}


def _saved(
    folder: Path,
    model: Any,
    processor_class: Any,
    tokenizer: PreTrainedTokenizerFast,
    image_settings: Mapping[str, Any] | None,
    template: str | None,
    names: Names,
    shard_size: str,
) -> Any:
    model.save_pretrained(folder, max_shard_size=shard_size)
    patch, merge = model.config.vision_config.patch_size, model.config.spatial_merge_size
    images = PixtralImageProcessorPil(**{"size": {"longest_edge": 96}, "patch_size": patch, **(image_settings or {})})
    sides = {"patch_size": patch, "spatial_merge_size": merge}
    processor_class(images, tokenizer, chat_template=template, **sides).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model
