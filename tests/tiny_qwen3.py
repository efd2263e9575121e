"""Tiny random Qwen3-VL checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)

from tests.tiny import Names, qwen_config, qwen_tokenizer, random_model, save_qwen, save_state_dict

__all__ = ["QWEN3_TEMPLATE", "save_tiny_qwen3_vl"]

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen3VLConfig),
    "qwen3_vl_moe": (Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig),
}
# No system message of its own; placeholders of videos, too.
QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_qwen3_vl(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = QWEN3_TEMPLATE,
    names: Names = "saved",
    model_type: str = "qwen3_vl",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Qwen3-VL with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, cells of 2 × 2, learned positions for 6 × 6 patches, up to 64 cells, 3 + 2 layers of
    which the tower's first and second are merged for the decoder's, hidden sizes 64 (text) and 48 (tower); of
    `qwen3_vl_moe` two of four experts.
    """
    tokenizer = qwen_tokenizer()
    architecture, config_class = _CLASSES[model_type]
    if model_type == "qwen3_vl_moe":
        text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, **(text or {})}
    model = random_model(architecture, _config(config_class, tokenizer, text, vision, config), tokenizer, seed)
    processor = save_qwen(folder, model, Qwen3VLProcessor, tokenizer, image_settings, template, shard_size)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder, processor)
    return model


def _config(
    config_class: Any,
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Any:
    shared = qwen_config(tokenizer, {"head_dim": 16, **(text or {})})
    tower = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_heads": 4,
        "patch_size": 8,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": shared["text_config"]["hidden_size"],
        **(vision or {}),
    }
    return config_class(vision_config=tower, **{**shared, **(config or {})})


def _as_on_the_hub(folder: Path, processor: Qwen3VLProcessor) -> None:
    """Older forms of files: `rope_scaling`, a tower of the model's own type, image settings in a file of their own."""
    config = json.loads((folder / "config.json").read_text())
    text, tower = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {
        "mrope_interleaved": True,
        "mrope_section": rope["mrope_section"],
        "rope_type": "default",
    }
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    tower["model_type"] = config["model_type"]
    tower.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config))
    stated = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    stated["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (folder / "preprocessor_config.json").write_text(json.dumps({**stated, "processor_class": "Qwen3VLProcessor"}))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    (folder / "chat_template.jinja").unlink()
    path = folder / "model.safetensors"
    save_file({name: _transposed_experts(name, tensor) for name, tensor in load_file(path).items()}, path)


def _transposed_experts(name: str, tensor: Any) -> Any:
    """On the hub they are stored [experts, in, out]."""
    return tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
