"""Mistral 3 with Pixtral's tower."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_pixtral import save_tiny_mistral3

ROPE = {"rope_type": "axial", "rope_theta": 99.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "squares_of_four_patches": {},
    "inner_layer_biases_no_template": {
        "config": {"vision_feature_layer": [-2], "multimodal_projector_bias": True, "projector_hidden_act": "relu"},
        "template": None,
    },
    "squares_of_nine_tied_sharded": {
        "config": {"spatial_merge_size": 3, "tie_word_embeddings": True},
        "vision": {
            "patch_size": 6,
            "hidden_act": "silu",
            "rope_parameters": ROPE,
        },
        "image_settings": {"size": {"longest_edge": 100}, "resample": 2},
        "shard_size": "200KB",
        "seed": 3,
    },
    "single_patches_window": {
        "config": {"spatial_merge_size": 1},
        "vision": {"patch_size": 16},
        "text": {"sliding_window": 24},
    },
    "state_dict_names": {"names": "state_dict"},
}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strip": ("Read.", [(8, 400)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}
_PROCESSOR, _TOWER = "processor_config.json", "vision_tower.transformer.layers"

ROW = Row(
    "mistral3",
    save_tiny_mistral3,
    CONFIGS,
    CASES,
    compared=("squares_of_four_patches",),
    probed=("squares_of_four_patches",),
    spared={
        "calibration": "cells as those of qwen2_vl; the decoder is one of llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    placeholder="[IMG]",
    tokens=("[IMG_BREAK]", "[IMG_END]"),
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("vision_feature_layer = [-1, -2]", sets(vision_feature_layer=[-1, -2])),
        Bad("vision_feature_layer = 5", sets(vision_feature_layer=5)),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("num_channels = 4", sets("vision_config", num_channels=4)),
        Bad("spatial_merge_size = 2, the model's is 4", sets(spatial_merge_size=4)),
        Bad("patch_size = 8, the model's is 16", sets("vision_config", patch_size=16)),
        Bad("ministral3", sets("text_config", model_type="ministral3")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("longest_edge", sets("image_processor", size={"longest_edge": 8}), _PROCESSOR),
        Bad("do_center_crop", sets("image_processor", do_center_crop=True, crop_size=32), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("ViTImageProcessor", sets("image_processor", image_processor_type="ViTImageProcessor"), _PROCESSOR),
        Bad("gate_proj", sets("vision_config", intermediate_size=256), error="WeightsError"),
    ),
    needed=(
        Tensor("vision_tower.ln_pre.weight"),
        Tensor("vision_tower.patch_conv.weight"),
        Tensor(f"{_TOWER}.1.attention.k_proj.weight"),
        Tensor("multi_modal_projector.patch_merger.merging_layer.weight"),
        Tensor("multi_modal_projector.norm.weight"),
    ),
    unneeded=(
        Tensor(f"{_TOWER}.7.ffn_norm.weight"),
        Tensor(f"{_TOWER}.1.attention.k_proj.bias"),
        Tensor("multi_modal_projector.linear_1.bias"),
    ),
)
