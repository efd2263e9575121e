"""Tiny random Granite 4 Vision checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mllm_edge.export.families.granite4_vision import with_cache
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_granite4_vision"]

_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
_RESOLUTIONS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]


def save_tiny_granite4_vision(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = _TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Granite 4 Vision with its processor files to `folder` and return the model in float32.

    The defaults: a SigLIP tower of 48 px and 8 px patches with 3 layers, windows of 2 × 2 patches that make a feature
    each, for five layers of a Granite with 6, hidden sizes 64.
    """
    end = "<|end_of_text|>"
    core = byte_tokenizer(end, "<|pad|>", "<|start_of_role|>", "<|end_of_role|>", "<image>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token="<|pad|>")
    made = _config(tokenizer, text, vision, config)
    model = random_model(Granite4VisionForConditionalGeneration, made, tokenizer, seed)
    with_cache(model)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side, clip = made.vision_config.image_size, made.vision_config.model_type == "clip_vision_model"
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {**sizes, "image_grid_pinpoints": made.image_grid_pinpoints, **(image_settings or {})}
    Granite4VisionProcessor(
        LlavaNextImageProcessorPil(**settings),
        tokenizer,
        patch_size=made.vision_config.patch_size,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
        downsample_rate=made.downsample_rate,
        chat_template=template,
    ).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Granite4VisionConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 6, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0}
    tower = {"model_type": "siglip_vision_model", "num_hidden_layers": 3, "image_size": 48, "patch_size": 8}
    return Granite4VisionConfig(
        text_config={**sizes, **decoder, "attention_multiplier": 0.2, **factors, **(text or {})},
        vision_config={**sizes, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{
            "image_grid_pinpoints": _RESOLUTIONS,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0]],
            "spatial_target_layers": [1, 2, 4, 5],
            "qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 96},
            **(config or {}),
        },
    )
