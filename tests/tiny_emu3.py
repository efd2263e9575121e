"""Tiny random Emu3 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3Processor, PreTrainedTokenizerFast
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_emu3"]

_CODES, _FIRST, _ROW_END = 16, 290, "<|extra_200|>"
_NAMED = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}


def save_tiny_emu3(
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
    """Save a random Emu3 with its processor files to `folder` and return the model in float32.

    The defaults: images of 32² to 64² px, of which 8 × 8 px become one of 16 words, a decoder with 2 layers, hidden
    size 64.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<s>", "</s>", "<pad>", *_NAMED.values(), _ROW_END),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=_NAMED,
    )
    made = _config(tokenizer, text, vision, config)
    model = random_model(Emu3ForConditionalGeneration, made, tokenizer, seed)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.data = torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    images = Emu3ImageProcessor(**{"min_pixels": 32**2, "max_pixels": 64**2, **(image_settings or {})})
    processor = Emu3Processor(images, tokenizer, chat_template=template)
    processor.save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Emu3Config:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "pad_token_id": 0}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = {"base_channels": 32, "channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 1, "hidden_size": 64}
    words = {f"<|visual token {code:06d}|>": _FIRST + (code * 7) % _CODES for code in range(_CODES)}
    others = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<image>", _ROW_END)}
    return Emu3Config(
        text_config={**sizes, **decoder, **ends, **(text or {})},
        vq_config={**encoder, "codebook_size": _CODES, **(vision or {})},
        vocabulary_map={**words, **others},
        **(config or {}),
    )
