"""Ovis 2."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_ovis2 import save_tiny_ovis2

CONFIGS: dict[str, dict[str, Any]] = {
    "tiles": {"seed": 1},
    "untied_no_template_stride_3": {
        "config": {"tie_word_embeddings": False},
        "vision": {"hidden_stride": 3, "qkv_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        "template": None,
    },
    "one_tile_every_patch_sharded": {
        "vision": {"hidden_stride": 1, "image_size": 40},
        "image_settings": {"crop_to_patches": False},
        "shard_size": "200KB",
        "seed": 3,
    },
    "state_dict_names_few_tiles": {
        "names": "state_dict",
        "config": {"tie_word_embeddings": False},
        "image_settings": {"max_patches": 2, "resample": 2},
    },
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
    "tall": ("What?", [(90, 39)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "ovis2",
    save_tiny_ovis2,
    CONFIGS,
    CASES,
    compared=("tiles",),
    probed=("tiles",),
    spared={
        "calibration": "a decoder as llava_onevision's, and layers of a tower as those of qwen2_5_vl",
        "int8_cache": "llava_onevision's decoder",
        "segments": "llava_onevision's decoder",
        "speculation": "llava_onevision's decoder",
    },
    placeholder="<IMG_ATOM>",
    bad=(
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("tokenize_function = 'gumbel_argmax'", sets("vision_config", tokenize_function="gumbel_argmax")),
        Bad("hidden_stride = 4 of 6 patches", sets("vision_config", hidden_stride=4)),
        Bad("num_channels = 4", sets("vision_config", num_channels=4)),
        Bad("50 visual words and 4 tokens", sets(visual_indicator_token_ids=[264, 265, 266, 267])),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("use_covering_area_grid", sets("image_processor", use_covering_area_grid=False), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_seq_length = 256", sets(image_seq_length=256), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("position_embedding", sets("vision_config", patch_size=12), error="WeightsError"),
    ),
    needed=(
        Tensor("model.vision_tower.head_norm.bias"),
        Tensor("model.visual_embeddings_table.weight"),
        Tensor("model.vision_tower.transformer.rms_norm.weight"),
    ),
    unneeded=(
        Tensor("model.vision_tower.head_linear.bias"),
        Tensor("model.vision_tower.transformer.encoder.layers.7.ffn.up_proj.weight"),
        Tensor("model.language_model.layers.7.mlp.up_proj.weight"),
    ),
    tokens=("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
)
