"""Tiny random DeepSeek-VL checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["DEEPSEEK_TEMPLATE", "deepseek_tokenizer", "save_tiny_deepseek_vl", "save_tiny_deepseek_vl_hybrid"]

PLACEHOLDER = "<image_placeholder>"
DEEPSEEK_TEMPLATE = (
    "{{ 'You help.\n\n' }}{% for message in messages %}"
    "{{ 'User: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image_placeholder>' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def deepseek_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges and the special tokens of DeepSeek-VL."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<|begin|>", "<|end|>", PLACEHOLDER, "<|ref|>", "<|det|>"),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens={"image_token": PLACEHOLDER},
    )


def save_tiny_deepseek_vl(folder: Path, **settings: Any) -> Any:
    """Save a random DeepSeek-VL with its processor files to `folder` and return the model in float32; `settings` as of
    `_save`."""
    parts = DeepseekVLForConditionalGeneration, DeepseekVLConfig, DeepseekVLProcessor, DeepseekVLImageProcessorPil
    return _save(folder, parts, {}, {}, **settings)


def save_tiny_deepseek_vl_hybrid(folder: Path, *, high: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """As save_tiny_deepseek_vl, with a second tower of 64 px and 8 px patches with 3 layers, hidden size 32; `high`
    overrides its configuration."""
    parts = (
        DeepseekVLHybridForConditionalGeneration,
        DeepseekVLHybridConfig,
        DeepseekVLHybridProcessor,
        DeepseekVLHybridImageProcessorPil,
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48, "output_channels": 12}
    tower = {"image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1], **sizes, **(high or {})}
    side = tower["image_size"]
    size = {"high_res_size": {"height": side, "width": side}}
    return _save(folder, parts, {"high_res_vision_config": tower}, size, **settings)


def _save(
    folder: Path,
    parts: tuple[Any, Any, Any, Any],
    further: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = DEEPSEEK_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """The defaults: a SigLIP tower of 48 px and 8 px patches with 2 layers, a Llama with 2, hidden sizes 64."""
    architecture, config_class, processor_class, image_processor = parts
    tokenizer = deepseek_tokenizer()
    made = config_class(**_config(tokenizer, text, vision, config), **further)
    model = random_model(architecture, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    size = {"size": {"height": tower.image_size, "width": tower.image_size}}
    tokens = (tower.image_size // tower.patch_size) ** 2
    images = image_processor(**{**size, **sizes, **(image_settings or {})})
    processor_class(images, tokenizer, chat_template=template, num_image_tokens=tokens).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _rename(folder / "model.safetensors")
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    return {
        "text_config": {"model_type": "llama", **sizes, **decoder, **(text or {})},
        "vision_config": {
            "model_type": "siglip_vision_model",
            **sizes,
            **{"image_size": 48, "patch_size": 8},
            **(vision or {}),
        },
        "image_token_id": tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        **{"tie_word_embeddings": False, **(config or {})},
    }


def _rename(path: Path) -> None:
    """SigLIP's tensors under the names that older versions have for them."""
    tensors = load_file(path)
    save_file({name.replace(".vision_model.", ".vision_model.vision_model."): t for name, t in tensors.items()}, path)
