"""Tiny random Chameleon checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_chameleon"]

_CODES, _FIRST = 16, 290
_NAMED = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}


def save_tiny_chameleon(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = None,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Chameleon with its processor files to `folder` and return the model in float32.

    The defaults: images of 32 px that become 8 × 8 of 16 words, a decoder with 2 layers, hidden size 64.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<s>", "</s>", "<sep>", *_NAMED.values()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        sep_token="<sep>",
        extra_special_tokens=_NAMED,
    )
    made = ChameleonConfig(**_config(tokenizer, text, vision, config))
    model = random_model(ChameleonForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vq_config.resolution
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    tokens = (side // 2 ** (len(made.vq_config.channel_multiplier) - 1)) ** 2
    images = ChameleonImageProcessorPil(**{**size, **(image_settings or {})})
    processor = ChameleonProcessor(images, tokenizer, image_seq_length=tokens)
    processor.chat_template = template
    processor.save_pretrained(folder)
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
    decoder = {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    encoder = {"embed_dim": 8, "latent_channels": 12, "base_channels": 32, "num_res_blocks": 1}
    sides = {"resolution": 32, "channel_multiplier": [1, 1, 2]}
    letters = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(_CODES)]
    words = {f"IMGIMG{letters[code]}Z": _FIRST + (code * 7) % _CODES for code in range(_CODES)}
    return {
        **sizes,
        **decoder,
        "vq_config": {**encoder, **sides, "num_embeddings": _CODES, **(vision or {})},
        "vocabulary_map": {"<image>": tokenizer.convert_tokens_to_ids("<image>"), **words},
        **{"tie_word_embeddings": False, **(text or {}), **(config or {})},
    }
