"""LLaVA 1.5 and its relatives."""

from typing import Any

from tests.families.row import Row
from tests.tiny import save_tiny_llava

SIGLIP = {"model_type": "siglip_vision_model"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_multi_head_no_template": {"text": {"num_key_value_heads": 4}, "template": None},
    "mistral_window": {"text": {"model_type": "mistral", "sliding_window": 24}, "config": {"vision_feature_layer": 2}},
    "qwen2_tied": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}},
    "gemma3_window": {
        "text": {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "config": {"tie_word_embeddings": True},
    },
    "last_layer_full": {"config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}},
    "several_layers": {"config": {"vision_feature_layer": [-2, 1, -1], "multimodal_projector_bias": False}},
    "several_layers_full": {
        "config": {"vision_feature_layer": [0, 3], "vision_feature_select_strategy": "full"},
        "vision": {"hidden_act": "gelu"},
    },
    "embeddings_only": {"config": {"vision_feature_layer": [0], "projector_hidden_act": "relu"}},
    "siglip_full_qwen2": {
        "text": {"model_type": "qwen2"},
        "vision": {**SIGLIP, "image_size": 54},
        "config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "images": "siglip",
    },
    "siglip_drops_a_patch": {"vision": {**SIGLIP, "vision_use_head": False}, "images": "siglip"},
    "padded_to_square": {"images": "llava", "image_settings": {"do_pad": True}},
    "larger_before_the_crop": {"image_settings": {"size": {"shortest_edge": 57}, "resample": 2}},
    "cropped_beyond_the_image": {"image_settings": {"size": {"shortest_edge": 31}}},
    "sharded": {"shard_size": "200KB", "seed": 3},
    "state_dict_names": {"names": "state_dict"},
    "hub_names": {"names": "hub", "config": {"projector_hidden_act": "gelu_pytorch_tanh"}},
}

ROW = Row("llava", save_tiny_llava, CONFIGS, compared=("siglip_full_qwen2",), probed=("mistral_window", "qwen2_tied"))
