"""Tiny random Qwen2.5-VL checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from tests.tiny import (
    QWEN_TEMPLATE,
    Names,
    qwen_config,
    qwen_tokenizer,
    random_model,
    save_qwen,
    save_state_dict,
)

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
    save_qwen(folder, model, Qwen2_5_VLProcessor, tokenizer, image_settings, template, shard_size)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Qwen2_5_VLConfig:
    shared = qwen_config(tokenizer, text)
    tower = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 48,
        "fullatt_block_indexes": [1],
        "out_hidden_size": shared["text_config"]["hidden_size"],
        **(vision or {}),
    }
    return Qwen2_5_VLConfig(vision_config=tower, **{**shared, **(config or {})})
