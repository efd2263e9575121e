"""Tiny random GOT-OCR 2 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_got_ocr2"]

_PAD, _WORDS = "<imgpad>", ("<img>", "</img>", "<|im_start|>", "<|im_end|>")


def save_tiny_got_ocr2(
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
    """Save a random GOT-OCR 2 with its processor files to `folder` and return the model in float32.

    The defaults: an encoder of 80 px and 8 px patches with 3 layers, of which one sees the whole image, hidden size 32;
    a Qwen2 with 2 layers, hidden size 64. As published, there is no chat template.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<|endoftext|>", _PAD, *_WORDS),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[_PAD, *_WORDS],
    )
    made = GotOcr2Config(**_config(tokenizer, text, vision, config))
    model = random_model(GotOcr2ForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    images = GotOcr2ImageProcessorPil(**{"size": {"height": side, "width": side}, **(image_settings or {})})
    GotOcr2Processor(images, tokenizer, chat_template=template).save_pretrained(folder)
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
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48, "output_channels": 12}
    grid = {"image_size": 80, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1]}
    return {
        "text_config": {"model_type": "qwen2", **sizes, **decoder, **(text or {})},
        "vision_config": {**tower, **grid, **(vision or {})},
        "image_token_index": tokenizer.convert_tokens_to_ids(_PAD),
        **{"tie_word_embeddings": True, **(config or {})},
    }
