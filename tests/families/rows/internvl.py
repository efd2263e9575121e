"""InternVL in both layouts."""

from pathlib import Path
from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Row
from tests.tiny_internvl import save_tiny_internvl, save_tiny_internvl_chat

ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
QK_NORM = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}

# transformers' layout.
SAVED: dict[str, dict[str, Any]] = {
    "qwen2_untied": {},
    "qwen2_tied": {"config": {"tie_word_embeddings": True}},
    "llama_no_template": {"text": {"model_type": "llama", "num_key_value_heads": 4}, "template": None},
    "qwen3": {"text": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}},
    "state_dict_names": {"names": "state_dict", "images": {"min_patches": 2, "max_patches": 3}},
    "rms_norm_qk_norm": {"vision": QK_NORM, "images": {"crop_to_patches": True}},
    "one_tile": {"images": {"max_patches": 1, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
    "inner_layer": {"config": {"vision_feature_layer": -2}},
    "last_layer_before_the_norm": {"config": {"vision_feature_layer": 3}, "vision": {"use_mean_pooling": False}},
    "last_norm_mask_token": {"vision": {"use_mean_pooling": False, "use_mask_token": True}},
    "quarter_relu": {
        "config": {"downsample_ratio": 0.25, "projector_hidden_act": "relu"},
        "vision": {"image_size": 48},
    },
    "sharded_many_tiles": {"shard_size": "300KB", "seed": 3, "images": {"max_patches": 12}},
}
# The original layout.
CHAT: dict[str, dict[str, Any]] = {
    "chat_qwen2": {},
    "chat_qwen2_tied": {"config": {"tie_word_embeddings": True}, "top": {"use_thumbnail": False}},
    "chat_llama": {"text": {"model_type": "llama"}, "top": {"min_dynamic_patch": 2, "max_dynamic_patch": 4}},
    "chat_qwen3": {"text": {"model_type": "qwen3"}, "top": {"force_image_size": None}},
    "chat_internlm2": {"internlm2": True, "text": {"num_key_value_heads": 1}},
    "chat_internlm2_dynamic_sharded": {"internlm2": True, "text": {"rope_parameters": ROPE}, "shards": 2, "seed": 1},
    "chat_internlm2_multi_head_tied": {
        "internlm2": True,
        "text": {"num_key_value_heads": 4},
        "config": {"tie_word_embeddings": True},
    },
    "chat_rms_norm_qk_norm": {"vision": QK_NORM, "top": {"max_dynamic_patch": 1}},
    "chat_static": {"top": {"dynamic_image_size": False}, "vision": {"norm_type": "rms_norm"}},
    "chat_inner_layer": {"config": {"vision_feature_layer": -2}, "vision": {"attention_bias": False}},
}
CONFIGS = {**SAVED, **{name: {"chat": True, **config} for name, config in CHAT.items()}}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strips": ("Read.", [(2, 400), (350, 3)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}


def save(folder: Path, *, chat: bool = False, **config: Any) -> Any:
    """In transformers' layout, or the original one."""
    return (save_tiny_internvl_chat if chat else save_tiny_internvl)(folder, **config)


ROW = Row(
    "internvl",
    save,
    CONFIGS,
    CASES,
    compared=("qwen2_untied", "rms_norm_qk_norm", "chat_internlm2", "chat_qwen2_tied"),
    placeholder="<IMG_CONTEXT>",
    probed=("qwen3", "chat_internlm2", "chat_qwen2"),
)
