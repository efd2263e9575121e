"""Tiny random Aria checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AriaConfig, AriaForConditionalGeneration, AriaProcessor, PreTrainedTokenizerFast
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["ARIA_TEMPLATE", "save_tiny_aria"]

ARIA_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] is iterable %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}<fim_prefix><|img|><fim_suffix>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<|img|>", "<fim_suffix>")


def save_tiny_aria(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = ARIA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Aria with its processor files to `folder` and return the model in float32.

    The defaults: a tower trained on 280 px with 70 px patches and 2 layers, 6 queries for images of 980 px, a decoder
    with 2 layers of 4 experts, 2 of which a token takes, and 2 shared ones; hidden sizes 64, but 48 of the tower.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_SPECIAL),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<|img|>"},
    )
    made = _config(tokenizer, text, vision, config)
    model = random_model(AriaForConditionalGeneration, made, tokenizer, seed)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data *= 5  # half precision would choose other experts, where two are nearly as good
    model.save_pretrained(folder, max_shard_size=shard_size)
    queries = {side: _queries(made, side) for side in (490, 980)}
    images = AriaImageProcessorPil(**(image_settings or {}))
    AriaProcessor(images, tokenizer, chat_template=template, size_conversion=queries).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _queries(config: AriaConfig, side: int) -> int:
    return config.projector_patch_to_query_dict[(side // config.vision_config.patch_size) ** 2]


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> AriaConfig:
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2, "vocab_size": 320}
    tower = {"hidden_size": 48, "intermediate_size": 96, "image_size": 280, "patch_size": 70}
    stated = {"projector_patch_to_query_dict": {"49": 3, "196": 6}, "pad_token_id": tokenizer.pad_token_id}
    return AriaConfig(
        text_config={"model_type": "aria_text", **sizes, **decoder, **experts, **(text or {})},
        vision_config={"model_type": "idefics3_vision", **sizes, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"),
        **{**stated, **(config or {})},
    )


def _as_on_the_hub(folder: Path) -> None:
    """The image processor's settings where older versions look for them."""
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(stated))
