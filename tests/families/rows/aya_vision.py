"""Aya Vision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_aya_vision import save_tiny_aya_vision

CONFIGS: dict[str, dict[str, Any]] = {
    "tiles": {},
    "untied_no_template_inner_layer": {
        "config": {
            "tie_word_embeddings": False,
            "vision_feature_layer": 1,
            "alignment_intermediate_size": 48,
            "downsample_factor": 3,
        },
        "text": {"attention_bias": True, "num_key_value_heads": 4},
        "template": None,
    },
    "one_tile_sharded": {"image_settings": {"max_patches": 1}, "shard_size": "200KB", "seed": 3},
    "state_dict_names_several_at_least": {
        "names": "state_dict",
        "config": {"tie_word_embeddings": False},
        "text": {"num_hidden_layers": 3, "layer_types": None, "sliding_window": 9},
        "image_settings": {"min_patches": 2, "max_patches": 3, "resample": 2},
    },
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "aya_vision",
    save_tiny_aya_vision,
    CONFIGS,
    CASES,
    compared=("tiles",),
    probed=("tiles",),
    spared={
        "calibration": "the tower is that of llava",
        "eight_bits": "the tower is that of llava",
        "segments": "tests/decoders/test_split.py cuts the decoder; there is one place for that in two layers",
    },
    placeholder="<|IMG_PATCH|>",
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("vision_feature_select_strategy = 'default'", sets(vision_feature_select_strategy="default")),
        Bad("vision_feature_layer = -9", sets(vision_feature_layer=-9)),
        Bad("vision_feature_layer [-1, -2]", sets(vision_feature_layer=[-1, -2])),
        Bad("downsample_factor 4 of 6 patches", sets(downsample_factor=4)),
        Bad("alignment_intermediate_size 63", sets(alignment_intermediate_size=63)),
        Bad("'linear_attention'", sets("text_config", layer_types=["linear_attention", "full_attention"])),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("at most 0 tiles", sets("image_processor", max_patches=0), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("give 36 tokens", sets(patch_size=8), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("position_embedding", sets("vision_config", patch_size=12), error="WeightsError"),
    ),
    needed=(
        Tensor("multi_modal_projector.layernorm.weight"),
        Tensor("vision_tower.encoder.layers.1.mlp.fc1.bias"),
        Tensor("language_model.model.layers.1.self_attn.k_proj.weight"),
    ),
    unneeded=(
        Tensor("multi_modal_projector.linear_3.weight"),
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
    tokens=("<|START_OF_IMG|>", "<|END_OF_IMG|>"),
)
