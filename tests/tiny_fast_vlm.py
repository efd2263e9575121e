"""Tiny random FastVLM checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.timm_reference import stand_in_for_timm
from tests.tiny import LLAVA_TEMPLATE, Names, make_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_fast_vlm"]

stand_in_for_timm()


def save_tiny_fast_vlm(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = LLAVA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random FastVLM with its processor files to `folder` and return the model in float32.

    The defaults: images of 128 px, which make 4 features, a layer in each stage and two in the fourth, a Qwen2 with 2
    layers of size 64.
    """
    tokenizer = make_tokenizer()
    model = random_model(FastVlmForConditionalGeneration, _config(tokenizer, text, vision, config), tokenizer, seed)
    _varied(model, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    size = {"height": 128, "width": 128}
    settings = {"size": {"shortest_edge": 128}, "crop_size": size, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    images = CLIPImageProcessorPil(**{**settings, **(image_settings or {})})
    LlavaProcessor(images, tokenizer, patch_size=64, chat_template=template).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: Any, text: Mapping[str, Any] | None, vision: Mapping[str, Any] | None, config: Mapping[str, Any] | None
) -> FastVlmConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    tower = {"inference_mode": True, "layers": [1, 1, 1, 2, 1], "embed_dims": [4, 8, 16, 32, 32]}
    wrapped = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "model_args": tower, "hidden_size": 64}
    return FastVlmConfig(
        text_config={"model_type": "qwen2", **sizes, **decoder, **(text or {})},
        vision_config={**wrapped, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **(config or {}),
    )


def _varied(model: Any, seed: int) -> None:
    """Statistics of the batch norms that change what they see, and features as large as those of other towers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        for name, tensor in model.named_parameters():
            if "reparam_conv" in name or ".conv.conv." in name:
                tensor.mul_(3)
            elif ".bn.weight" in name or name.endswith("gamma"):
                tensor.add_(1)
