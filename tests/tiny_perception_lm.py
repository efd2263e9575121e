"""Tiny random PerceptionLM checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration, PreTrainedTokenizerFast

from tests.timm_reference import stand_in_for_timm
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["PERCEPTION_TEMPLATE", "save_tiny_perception_lm"]

stand_in_for_timm()

_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|video|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
PERCEPTION_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image|>' }}{%- endfor %}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<|video|>' }}{%- endfor %}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{- content['text'] | trim }}{%- endfor %}{{'<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def save_tiny_perception_lm(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    tower: Mapping[str, Any] | None = None,
    architecture: str = "vit_pe_core_large_patch14_336",
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    video_settings: Mapping[str, Any] | None = None,
    template: str | None = PERCEPTION_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random PerceptionLM with its processor files to `folder` and return the model in float32; `tower` are
    timm's options, `video_settings` beside the size, None for no video processor.

    The defaults: tiles of 56 px, which make 4 features each, up to 4 of them and the whole; 2 + 2 layers of sizes 128
    (tower) and 64.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_SPECIAL),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    )
    made = _config(tokenizer, architecture, text, tower, config)
    model = random_model(PerceptionLMForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    side = made.vision_config.model_args["img_size"][0]
    processor = {"patch_size": 14, "pooling_ratio": made.projector_pooling_ratio}
    images = {"image_processor_type": "PerceptionLMImageProcessorFast", "tile_size": side, "max_num_tiles": 4}
    size = {"size": {"height": side, "width": side}}
    written = {
        "processor_config.json": {"processor_class": "PerceptionLMProcessor", **processor},
        "preprocessor_config.json": {**images, **size, **(image_settings or {})},
    }
    if video_settings is not None:
        own = {"video_processor_type": "PerceptionLMVideoProcessor", **size, **video_settings}
        written["video_preprocessor_config.json"] = own
    for name, settings in written.items():
        (folder / name).write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    text: Mapping[str, Any] | None,
    tower: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> PerceptionLMConfig:
    decoder = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
    }
    options = {
        "embed_dim": 128,
        "depth": 2,
        "img_size": [56, 56],
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": [4, 4],
        **(tower or {}),
    }
    return PerceptionLMConfig(
        text_config={**decoder, **(text or {})},
        vision_config={"model_type": "timm_wrapper", "architecture": architecture, "model_args": options},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **{"projector_pooling_ratio": 2, "vision_use_cls_token": architecture.endswith("336"), **(config or {})},
    )
