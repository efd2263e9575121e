"""GLM-4V."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_glm4v import save_tiny_glm4v

CONFIGS: dict[str, dict[str, Any]] = {
    "cells": {},
    "tied_no_template": {
        "config": {"tie_word_embeddings": True},
        "vision": {"image_size": 80, "hidden_act": "gelu", "attention_bias": True},
        "template": None,
    },
    "all_turned_sharded": {
        "text": {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        },
        "shard_size": "200KB",
        "seed": 3,
    },
    "cells_of_one_patch_state_dict_names": {
        "names": "state_dict",
        "vision": {"spatial_merge_size": 1, "temporal_patch_size": 1, "image_size": 8},
        "image_settings": {"size": {"shortest_edge": 1, "longest_edge": 30 * 8**2}, "resample": 2},
    },
}
CASES = {
    **PROMPTS,
    "narrow": ("Read.", [(5, 300)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "glm4v",
    save_tiny_glm4v,
    CONFIGS,
    CASES,
    compared=("cells",),
    probed=("cells",),
    spared={
        "calibration": "the tower is made as those of qwen2_5_vl and qwen3_vl",
        "int8_cache": "layers as qwen2_vl's",
        "segments": "the decoder's pieces are shown in tests/decoders",
        "speculation": "positions as qwen2_vl's",
    },
    placeholder="<|image|>",
    bad=(
        Bad("out_hidden_size 32", sets("vision_config", out_hidden_size=32)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("in_channels = 4", sets("vision_config", in_channels=4)),
        Bad("rope_parameters", sets("vision_config", rope_parameters={"rope_type": "axial", "factor": 2.0})),
        Bad("patch_size is 16", sets("image_processor", patch_size=16), _PROCESSOR),
        Bad("temporal_patch_size is 1", sets("image_processor", temporal_patch_size=1), _PROCESSOR),
        Bad("two and even bounds", sets("image_processor", size={"shortest_edge": 7, "longest_edge": 900}), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("position_embedding", sets("vision_config", image_size=64), error="WeightsError"),
    ),
    needed=(
        Tensor("model.visual.downsample.weight"),
        Tensor("model.visual.post_conv_layernorm.weight"),
        Tensor("model.language_model.layers.1.post_mlp_layernorm.weight"),
    ),
    unneeded=(
        Tensor("model.visual.merger.up_proj.bias"),
        Tensor("model.visual.blocks.7.norm1.weight"),
        Tensor("model.language_model.layers.7.post_mlp_layernorm.weight"),
    ),
    tokens=("<|begin_of_image|>", "<|end_of_image|>"),
)
