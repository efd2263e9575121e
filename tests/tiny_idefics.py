"""Tiny random IDEFICS checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, PreTrainedTokenizerFast
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_idefics"]

_WORDS, _ADDED = ("<s>", "</s>"), ("<fake_token_around_image>", "<image>")


def save_tiny_idefics(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    perceiver: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    instruct: bool = True,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random IDEFICS with its processor files to `folder` and return the model in float32.

    The defaults: images of 32 px and 8 px patches, 2 layers in the tower, 2 in the resampler with 3 latents, 2 in the
    decoder, each behind one of cross-attention; hidden sizes 64, but 96 of the tower. The words for images have rows of
    their own behind those of the vocabulary; so has the end of a turn, where it is an `instruct` model.
    """
    added = (*_ADDED, "<end_of_utterance>") if instruct else _ADDED
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_WORDS, *added), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made = _config(len(tokenizer) - len(added), len(added), tokenizer, text, vision, perceiver, config)
    model = random_model(IdeficsForVisionText2Text, made, tokenizer, seed)
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.data *= 5  # gates that are open
    model.save_pretrained(folder, max_shard_size=shard_size)
    images = IdeficsImageProcessorPil(**{"image_size": made.vision_config.image_size, **(image_settings or {})})
    IdeficsProcessor(images, tokenizer).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _config(
    words: int,
    added: int,
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    perceiver: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> IdeficsConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = {"vocab_size": words, "additional_vocab_size": added, "max_position_embeddings": 1024}
    tower = {"embed_dim": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    latents = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return IdeficsConfig(
        **{**sizes, **vocabulary, **ids, "use_resampler": True, "qk_layer_norms": True, **(text or {})},
        vision_config={**tower, "image_size": 32, "patch_size": 8, **(vision or {})},
        perceiver_config={"use_resampler": True, **latents, "qk_layer_norms_perceiver": True, **(perceiver or {})},
        **(config or {}),
    )


def _as_on_the_hub(folder: Path) -> None:
    """The image processor's settings alone, in an older form, older names of the configuration's parts, and the tables
    that older versions stored."""
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "perceiver_config"):
        config[part]["model_type"] = "idefics"
    config["vision_config"] |= {"image_num_channels": 3, "vision_model_name": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
    (folder / "config.json").write_text(json.dumps(config))
    stated = json.loads((folder / "processor_config.json").read_text())
    images = stated["image_processor"]
    kept = {key: images[key] for key in ("image_mean", "image_std", "image_num_channels", "image_processor_type")}
    kept |= {"image_size": images["size"]["height"], "processor_class": "IdeficsProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kept))
    (folder / "processor_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
