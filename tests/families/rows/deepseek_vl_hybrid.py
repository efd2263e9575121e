"""DeepSeek-VL's hybrid of two towers."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_deepseek import save_tiny_deepseek_vl_hybrid

CONFIGS: dict[str, dict[str, Any]] = {
    "windows_and_one_whole_layer": {},
    "windows_that_fit_tied_no_template": {
        "high": {"window_size": 4, "global_attn_indexes": [2, 0], "qkv_bias": False, "hidden_act": "relu"},
        "config": {"tie_word_embeddings": True},
        "template": None,
    },
    "no_windows_sharded": {
        "high": {"window_size": 0, "image_size": 40, "mlp_dim": 64},
        "shard_size": "200KB",
        "seed": 3,
    },
    "published_names_other_values": {
        "names": "hub",
        "image_settings": {
            "high_res_image_mean": [0.4, 0.5, 0.6],
            "high_res_resample": 2,
            "image_std": [0.5, 0.5, 0.5],
            "min_size": 20,
        },
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
    "deepseek_vl_hybrid",
    save_tiny_deepseek_vl_hybrid,
    CONFIGS,
    CASES,
    compared=("windows_and_one_whole_layer",),
    probed=("windows_and_one_whole_layer",),
    spared={
        "calibration": "decoder as that of llava",
        "int8_cache": "llava's decoder",
        "segments": "llava's decoder",
        "speculation": "llava's decoder",
    },
    placeholder="<image_placeholder>",
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("use_rel_pos = False", sets("high_res_vision_config", use_rel_pos=False)),
        Bad("use_abs_pos = False", sets("high_res_vision_config", use_abs_pos=False)),
        Bad("global_attn_indexes [7]", sets("high_res_vision_config", global_attn_indexes=[7])),
        Bad("global_attn_indexes []", sets("high_res_vision_config", global_attn_indexes=[])),
        Bad("hidden_act = 'swish'", sets("high_res_vision_config", hidden_act="swish")),
        Bad("num_channels = 4", sets("high_res_vision_config", num_channels=4)),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("72×72 px", sets("image_processor", high_res_size={"height": 72, "width": 72}), _PROCESSOR),
        Bad("do_pad", sets("image_processor", do_pad=False), _PROCESSOR),
        Bad("do_normalize", sets("image_processor", do_normalize=False), _PROCESSOR),
        Bad("min_size 49", sets("image_processor", min_size=49), _PROCESSOR),
        Bad("resample", sets("image_processor", high_res_resample=9), _PROCESSOR),
        Bad("num_image_tokens = 576", sets(num_image_tokens=576), _PROCESSOR),
        Bad(
            "layers.0.attn.rel_pos_h",
            sets("high_res_vision_config", window_size=4),
            error="WeightsError",
            also=("[5, 16]", "[7, 16]"),
        ),
    ),
    needed=(
        Tensor("model.high_res_vision_alpha"),
        Tensor("model.high_res_vision_neck.conv2.weight"),
        Tensor("model.high_res_vision_proj.conv1.weight"),
        Tensor("model.high_res_vision_model.vision_encoder.layers.2.attn.rel_pos_w"),
        Tensor("model.aligner.high_res_vision_proj.bias"),
    ),
    unneeded=(
        Tensor("model.high_res_vision_model.vision_encoder.layers.3.attn.qkv.weight"),
        Tensor("model.aligner.linear1.weight"),
        Tensor("model.vision_model.encoder.layers.7.mlp.fc1.weight"),
    ),
)
