"""Tiny random Llama 3.2 Vision checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["MLLAMA_TEMPLATE", "save_tiny_mllama"]

MLLAMA_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|image|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")


def save_tiny_mllama(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = MLLAMA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Llama 3.2 Vision with its processor files to `folder` and return the model in float32.

    The defaults: up to 4 tiles of 24 px and 8 px patches, 3 + 2 layers in the tower, 4 in the decoder, the second and
    last of which look at images; hidden sizes 64 (text) and 48 (tower). The placeholder's id is behind those that have
    a logit, as in the published models.
    """
    tokenizer = _tokenizer()
    made = _config(tokenizer, text, vision, config)
    model = random_model(MllamaForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    sizes = {"size": {"height": tower.image_size, "width": tower.image_size}, "max_image_tiles": tower.max_num_tiles}
    images = MllamaImageProcessorPil(**{**sizes, **(image_settings or {})})
    MllamaProcessor(images, tokenizer, chat_template=template).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder, model)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges and the special tokens of Llama 3.2 Vision, 320 and the placeholder."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(320 - 256 - len(_SPECIAL))]
    core = byte_tokenizer(*_SPECIAL, *reserved, "<|image|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|python_tag|>"
    )


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> MllamaConfig:
    placeholder = tokenizer.convert_tokens_to_ids("<|image|>")
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "vocab_size": placeholder,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **(text or {}),
    }
    tower = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 144,
        **(vision or {}),
    }
    return MllamaConfig(
        text_config=decoder, vision_config=tower, **{"image_token_index": placeholder, **(config or {})}
    )


def _as_on_the_hub(folder: Path, model: Any) -> None:
    """The published names of tensors and files."""
    published = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
    published |= {"model.vision_model.": "vision_model.", "model.multi_modal_projector.": "multi_modal_projector."}

    def rename(name: str) -> str:
        new = next(prefix for prefix in published if name.startswith(prefix))
        return published[new] + name.removeprefix(new)

    save_file({rename(k): v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated["image_processor"]))
    (folder / "processor_config.json").unlink()
