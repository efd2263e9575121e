"""Tiny random GLM-4V checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from mllm_edge.export.checkpoint.processing import for_images
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["GLM_TEMPLATE", "save_tiny_glm4v"]

_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_WORDS = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", *_IDS.values())
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_tiny_glm4v(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = GLM_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random GLM-4V with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, cells of 2 × 2, learned positions for 6 × 6 patches, up to 64 cells, 2 + 2 layers,
    hidden sizes 64 (text) and 48 (tower).
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<|endoftext|>", *_WORDS),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(_WORDS),
    )
    made = Glm4vConfig(**_config(tokenizer, text, vision, config))
    model = random_model(Glm4vForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    sides = {"patch_size": tower.patch_size, "merge_size": tower.spatial_merge_size}
    bounds = {"size": {"shortest_edge": 8 * 16**2, "longest_edge": 128 * 16**2}}
    images = Glm4vImageProcessorPil(
        **{**sides, "temporal_patch_size": tower.temporal_patch_size, **bounds, **(image_settings or {})}
    )
    for_images(Glm4vProcessor)(images, tokenizer, chat_template=template).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 1024, "rope_parameters": rope}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"depth": 2, "hidden_size": 48, "num_heads": 4, "patch_size": 8, "image_size": 48, "intermediate_size": 80}
    return {
        "text_config": {**sizes, **decoder, **ends, **(text or {})},
        "vision_config": {**tower, "out_hidden_size": 64, **(vision or {})},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in _IDS.items()},
        **{"tie_word_embeddings": False, **(config or {})},
    }
