"""LightOnOCR."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.families.rows.mistral3 import CASES
from tests.tiny_pixtral import save_tiny_lighton_ocr

CONFIGS: dict[str, dict[str, Any]] = {
    "patches_left_over": {},
    "whole_squares_no_template": {"image_settings": {"patch_size": 16}, "template": None},
    "squares_of_nine_tied_sharded": {
        "config": {"spatial_merge_size": 3, "tie_word_embeddings": True},
        "vision": {"patch_size": 4},
        "image_settings": {"size": {"longest_edge": 70}},
        "shard_size": "200KB",
        "seed": 3,
    },
    "state_dict_names": {"names": "state_dict"},
}
_PROCESSOR, _TOWER = "processor_config.json", "vision_encoder.transformer.layers"

ROW = Row(
    "lighton_ocr",
    save_tiny_lighton_ocr,
    CONFIGS,
    {name: case for name, case in CASES.items() if name not in ("strip", "unequal_images")}
    | {"unequal_images": ("Compare.", [(40, 40), (20, 95), (19, 17), (160, 97)])},
    compared=("patches_left_over",),
    probed=("patches_left_over",),
    spared={
        "calibration": "cells as those of qwen2_vl; the decoder is one of internvl's",
        "eight_bits": "cells as those of qwen2_vl; the decoder is one of internvl's",
        "int8_cache": "one of internvl's decoders",
        "segments": "decoders as those of llava and qwen2_vl",
        "speculation": "decoders as those of llava and qwen2_vl",
    },
    placeholder="<|image_pad|>",
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("spatial_merge_size = 2, the model's is 4", sets(spatial_merge_size=4)),
        Bad("multiples of 12 px", sets("image_processor", patch_size=12), _PROCESSOR),
        Bad("squares only", sets("image_processor", patch_size={"height": 8, "width": 16}), _PROCESSOR, also=("16",)),
        Bad("longest_edge", sets("image_processor", size={"longest_edge": 4}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("gate_proj", sets("vision_config", intermediate_size=256), error="WeightsError"),
    ),
    needed=(
        Tensor("model.vision_encoder.ln_pre.weight"),
        Tensor(f"model.{_TOWER}.1.attention.k_proj.weight"),
        Tensor("model.vision_projection.patch_merger.merging_layer.weight"),
    ),
    unneeded=(Tensor(f"model.{_TOWER}.7.ffn_norm.weight"), Tensor("model.vision_projection.linear_1.bias")),
)
