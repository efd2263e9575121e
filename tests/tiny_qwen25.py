"""Tiny random Qwen2.5-VL checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm_edge.export.checkpoint.processing import for_images
from tests.tiny import QWEN_TEMPLATE, Names, qwen_tokenizer, random_model

__all__ = ["save_tiny_qwen25_vl"]


def save_tiny_qwen25_vl(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = QWEN_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Qwen2.5-VL with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, cells of 2 × 2, windows of 3 × 3 cells, up to 64 cells, 3 + 2 layers of which the
    tower's second sees the whole image, hidden sizes 64 (text) and 48 (tower).
    """
    tokenizer = qwen_tokenizer()
    made = _config(tokenizer, text, vision, config)
    model = random_model(Qwen2_5_VLForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    sides = {"patch_size": tower.patch_size, "merge_size": tower.spatial_merge_size}
    frames = {"temporal_patch_size": tower.temporal_patch_size}
    bounds = {"min_pixels": 4 * 16**2, "max_pixels": 64 * 16**2}
    processor = for_images(Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessorPil(**{**sides, **frames, **bounds, **(image_settings or {})}),
        tokenizer,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    if names == "state_dict":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Qwen2_5_VLConfig:
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(text or {}),
    }
    tower = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 48,
        "fullatt_block_indexes": [1],
        "out_hidden_size": decoder["hidden_size"],
        **(vision or {}),
    }
    return Qwen2_5_VLConfig(text_config=decoder, vision_config=tower, **{**ids, **(config or {})})
