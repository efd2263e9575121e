"""Qwen2-VL."""

from typing import Any

from tests.families.row import Row
from tests.tiny import save_tiny_qwen2_vl

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mrope_section": [3, 3, 2],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped_query": {},
    "multi_head_tied": {"text": {"num_key_value_heads": 4}, "config": {"tie_word_embeddings": True}},
    "multi_query_old_files": {"text": {"num_key_value_heads": 1}, "names": "hub"},
    "tied_old_files": {"config": {"tie_word_embeddings": True}, "names": "hub"},
    "state_dict_names": {
        "names": "state_dict",
        "text": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5},
    },
    "sharded_one_layer": {"shard_size": "200KB", "seed": 3, "vision": {"depth": 1}},
    "cells_of_one_patch": {"vision": {"spatial_merge_size": 1, "hidden_act": "gelu"}},
    "cells_of_nine_patches": {"vision": {"spatial_merge_size": 3, "patch_size": 6, "num_heads": 3}},
    "one_frame": {"vision": {"temporal_patch_size": 1, "mlp_ratio": 4, "hidden_act": "gelu_pytorch_tanh"}},
    "one_cell_at_least": {"image_settings": {"min_pixels": 1, "max_pixels": 6 * 16**2}},
    "all_images_alike": {"image_settings": {"min_pixels": 40 * 16**2, "max_pixels": 40 * 16**2, "resample": 2}},
    "other_theta": {
        "vision": {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]}},
    },
    "yarn": {"text": {"rope_parameters": YARN}},
    "windowed": {"text": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}},
}

ROW = Row(
    "qwen2_vl",
    save_tiny_qwen2_vl,
    CONFIGS,
    compared=("grouped_query",),
    probed=("grouped_query",),
    placeholder="<|image_pad|>",
)
