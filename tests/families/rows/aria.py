"""Aria."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_aria import save_tiny_aria

CONFIGS: dict[str, dict[str, Any]] = {
    "experts": {},
    "one_expert_no_template_sharded": {
        "text": {
            "moe_topk": 1,
            "moe_num_shared_experts": 1,
            "intermediate_size": 64,
            "attention_bias": True,
            "num_key_value_heads": 4,
        },
        "template": None,
        "image_settings": {"min_image_size": 71, "resample": 2},
        "shard_size": "200KB",
        "seed": 3,
    },
    "as_large_as_trained_tied": {
        "vision": {"image_size": 980, "patch_size": 140, "hidden_act": "gelu"},
        "config": {"projector_patch_to_query_dict": {"9": 6, "49": 1}, "tie_word_embeddings": True},
        "image_settings": {"min_image_size": 980},
    },
    "published_files": {"names": "hub"},
    "state_dict_names": {"names": "state_dict"},
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "tall": ("What does it say?", [(301, 60)]),
    "large": ("Describe.", [(1301, 1117)]),
    "pixel": ("What?", [(1, 1)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "aria",
    save_tiny_aria,
    CONFIGS,
    CASES,
    compared=("experts",),
    probed=("experts",),
    spared={
        "calibration": "experts are calibrated in test_qwen3_vl.py; the tower is idefics2's",
        "eight_bits": "experts are calibrated in test_qwen3_vl.py; the tower is idefics2's",
        "int8_cache": "attention as in one of llava's decoders",
        "segments": "attention as in one of llava's decoders",
        "speculation": "attention as in one of llava's decoders",
    },
    placeholder="<|img|>",
    bad=(
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("hidden_act = 'gelu'", sets("text_config", hidden_act="gelu")),
        Bad("mlp_bias = True", sets("text_config", mlp_bias=True)),
        Bad("moe_topk 5 of 4 experts", sets("text_config", moe_topk=5)),
        Bad("moe_num_shared_experts = 0", sets("text_config", moe_num_shared_experts=0)),
        Bad("vision_feature_layer = -2", sets(vision_feature_layer=-2)),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("no number of queries for 196 patches", sets(projector_patch_to_query_dict={"49": 3})),
        Bad("no multiple of the vision tower's patch of 60", sets("vision_config", patch_size=60)),
        Bad("max_image_size is 490", sets("image_processor", max_image_size=490), _PROCESSOR),
        Bad("split_image is True", sets("image_processor", split_image=True), _PROCESSOR),
        Bad("min_image_size is 981", sets("image_processor", min_image_size=981), _PROCESSOR),
        Bad("size_conversion", sets(size_conversion={"490": 3, "980": 4}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("position_embedding", sets("vision_config", image_size=350), error="WeightsError"),
        Bad("experts.fc1.weight", sets("text_config", moe_num_experts=5), error="WeightsError"),
    ),
    needed=(
        Tensor("multi_modal_projector.query"),
        Tensor("multi_modal_projector.cross_attn.multihead_attn.in_proj_bias"),
        Tensor("multi_modal_projector.feed_forward.linear_in.weight"),
        Tensor("vision_tower.embeddings.patch_embedding.bias"),
        Tensor("language_model.model.layers.1.mlp.experts.fc2.weight", told="layers.1.mlp.experts.down_proj"),
        Tensor("language_model.model.layers.0.mlp.shared_experts.up_proj.weight"),
        Tensor("language_model.model.layers.1.mlp.router.weight"),
    ),
    unneeded=(
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("language_model.model.layers.1.mlp.gate_proj.weight"),
    ),
)
