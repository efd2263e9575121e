"""Tiny random Florence-2 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["florence_tokenizer", "save_tiny_florence2"]

_PLACES = tuple(f"<loc_{i}>" for i in range(8))


def florence_tokenizer(special: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, the special tokens of Florence-2, and some places, which are `special` or not."""
    core = byte_tokenizer("<s>", "<pad>", "</s>", "<image>")
    core.add_tokens([AddedToken(token, special=special, normalized=False) for token in _PLACES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def save_tiny_florence2(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    special: bool = False,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Florence-2 with its processor files to `folder` and return the model in float32.

    `text`, `vision`, `config`, `image_settings` and `generation` override the settings; `special`: as of
    `florence_tokenizer`. The defaults: images of 48 px, three stages of up to 12 × 12 patches and windows of 4, a BART
    of 2 + 2 layers, hidden size 64.
    """
    tokenizer = florence_tokenizer(special)
    made = Florence2Config(**_config(tokenizer, text, vision, config))
    model = random_model(Florence2ForConditionalGeneration, made, tokenizer, seed)
    for name, weight in model.model.language_model.named_parameters():
        if name.endswith(("encoder_attn.v_proj.weight", "encoder_attn.out_proj.weight", "embed_positions.weight")):
            # Norms behind the sums would leave little beside the last token, which all answers would repeat.
            weight.data *= 2
    stated = {"decoder_start_token_id": tokenizer.eos_token_id, "forced_bos_token_id": tokenizer.bos_token_id}
    for key, value in {**stated, **(generation or {})}.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder, max_shard_size=shard_size)
    settings = {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_seq_length": 10}
    images = CLIPImageProcessorPil(**{**settings, **(image_settings or {})})
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    told = dict(text or {})
    layers = told.pop("num_hidden_layers", 2)  # as other families call the decoder's
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
    }
    sizes = {"d_model": 64, "vocab_size": 280, "max_position_embeddings": 1024}
    return {
        "text_config": {"model_type": "bart", **sizes, **sides, "decoder_layers": layers, **ids, **told},
        "vision_config": {
            "depths": [1, 1, 1],
            "embed_dim": [16, 32, 48],
            "num_heads": [2, 4, 6],
            "num_groups": [2, 4, 6],
            "patch_size": [7, 3, 3],
            "patch_stride": [4, 2, 2],
            "patch_padding": [3, 1, 1],
            "patch_prenorm": [False, True, True],
            "window_size": 4,
            "projection_dim": 64,
            "max_position_embeddings": 9,
            "max_temporal_embeddings": 5,
            **(vision or {}),
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        **(config or {}),
    }
