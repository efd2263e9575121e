"""Tiny random PaliGemma checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_paligemma"]


def save_tiny_paligemma(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random PaliGemma with its processor files to `folder` and return the model in float32.

    The defaults: a SigLIP tower of 48 px and 8 px patches with 2 layers, a Gemma with 2, hidden sizes 64. The processor
    itself adds words for places and masks to the vocabulary.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<pad>", "<eos>", "<bos>", "<image>"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    made = _config(tokenizer, text, vision, config)
    model = random_model(PaliGemmaForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side, patch = made.vision_config.image_size, made.vision_config.patch_size
    settings = {"size": {"height": side, "width": side}, "image_seq_length": (side // patch) ** 2}
    images = SiglipImageProcessorPil(**{**settings, **(image_settings or {})})
    PaliGemmaProcessor(images, tokenizer).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder / "model.safetensors")
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> PaliGemmaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 16}
    decoder = {"vocab_size": 1472, "max_position_embeddings": 1024, **heads}
    tower = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    return PaliGemmaConfig(
        text_config={"model_type": "gemma", **sizes, **decoder, **(text or {})},
        vision_config={"model_type": "siglip_vision_model", **sizes, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{"projection_dim": 64, "hidden_size": 64, **(config or {})},
    )


def _as_on_the_hub(path: Path) -> None:
    """Older names of tensors."""
    tensors = load_file(path)
    save_file({_old(name): tensor for name, tensor in tensors.items()}, path)


def _old(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
    return name.replace("vision_tower.", "vision_tower.vision_model.")
