"""Tiny random LFM2-VL checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration, PreTrainedTokenizerFast

from tests.tiny import Names, make_tokenizer, random_model, save_state_dict

__all__ = ["LFM2_TEMPLATE", "lfm2_vl_tokenizer", "save_tiny_lfm2_vl"]

LFM2_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for content in message['content'] -%}{%- if content['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_TILES = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5) if row * col <= 4]
_SPECIAL = ("<|startoftext|>", "<|im_end|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")


def lfm2_vl_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges and the special tokens of LFM2-VL, for up to four tiles."""
    core = make_tokenizer(1, 1).backend_tokenizer
    core.add_special_tokens([*_SPECIAL, *_TILES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|im_start|>"
    )


def save_tiny_lfm2_vl(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = LFM2_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random LFM2-VL with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, cells of 2 × 2, 4 to 16 cells an image, up to 4 tiles of 64 px and the whole for one of
    more than 32 cells; positions for 4 × 4 patches; 2 layers of the tower, 3 of the decoder (one of them attends);
    hidden sizes 64 (text) and 48 (tower).
    """
    tokenizer = lfm2_vl_tokenizer()
    model = random_model(Lfm2VlForConditionalGeneration, _config(tokenizer, text, vision, config), tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Lfm2VlProcessor"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_images(model.config, image_settings)))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _as_on_the_hub(folder: Path) -> None:
    """Older names of tensors, the image processor's settings also in config.json, and all of them in one file."""
    weights = load_file(folder / "model.safetensors")
    tower = "model.vision_tower."
    save_file({n.replace(tower, f"{tower}vision_model."): w for n, w in weights.items()}, folder / "model.safetensors")
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    unused = {"size": {"height": 512, "width": 512}, "do_resize": False, "crop_size": None, "max_num_patches": 1024}
    stated = {"image_processor": {**images, **unused}, "processor_class": "Lfm2VlProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(stated))
    config = json.loads((folder / "config.json").read_text())
    config["tie_embedding"] = config.pop("tie_word_embeddings")
    unread = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "max_num_patches": 1024}
    (folder / "config.json").write_text(json.dumps({**config, **unread, "use_image_special_tokens": True}))


def _images(config: Lfm2VlConfig, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "encoder_patch_size": config.vision_config.patch_size,
        "downsample_factor": config.downsample_factor,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
        "tile_size": 64,
        "max_tiles": 4,
        "do_convert_rgb": None,
        **(settings or {}),
    }


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Lfm2VlConfig:
    decoder = {
        "model_type": "lfm2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_multiple_of": 32,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 8,
        "num_patches": 16,
        "vision_use_head": False,
    }
    return Lfm2VlConfig(
        text_config={**decoder, **(text or {})},
        vision_config={**tower, **(vision or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **{"projector_hidden_size": 80, **(config or {})},
    )
