"""Tiny random Granite-Docling checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_granite_docling"]

_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
_SPECIAL = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<fake_token_around_image>", "<image>")


def save_tiny_granite_docling(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = _TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Granite-Docling with its processor files to `folder` and return the model in float32.

    The defaults: tiles of 32 px and 4 px patches, 4 features a tile, up to 6 tiles, 3 + 2 layers, hidden sizes 64.
    """
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    end = "<|end_of_text|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_SPECIAL, "<global-img>", *tiles), eos_token=end, pad_token=end
    )
    model = random_model(
        GraniteDoclingForConditionalGeneration, _config(tokenizer, text, vision, config), tokenizer, seed
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = model.config.vision_config
    size = {"height": tower.image_size, "width": tower.image_size}
    images = GraniteDoclingImageProcessorPil(**{"size": size, "max_patches": 6, **(image_settings or {})})
    tokens = (tower.image_size // tower.patch_size // tower.scale_factor) ** 2
    GraniteDoclingProcessor(images, tokenizer, tokens, template).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> GraniteDoclingConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.pad_token_id}
    factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0}
    tower = {"num_hidden_layers": 3, "image_size": 32, "patch_size": 4, "out_hidden_size": 64, "scale_factor": 4}
    return GraniteDoclingConfig(
        text_config={
            **sizes,
            **decoder,
            **ids,
            "eos_token_id": tokenizer.eos_token_id,
            "attention_multiplier": 0.2,
            **factors,
            **(text or {}),
        },
        vision_config={**sizes, **tower, "deepstack_visual_indexes": [0, 2], **(vision or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": False, **(config or {})},
    )
