"""Qwen2.5-VL."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_qwen25 import save_tiny_qwen25_vl

CONFIGS: dict[str, dict[str, Any]] = {
    "windows_and_one_full_layer": {},
    "windows_alone_tied": {
        "vision": {"fullatt_block_indexes": []},
        "text": {"tie_word_embeddings": True},
        "config": {"tie_word_embeddings": True},
    },
    "full_layers_alone": {"vision": {"fullatt_block_indexes": [0, 1, 2]}, "template": None},
    "one_cell_a_window_sharded": {"vision": {"window_size": 16, "depth": 2}, "shard_size": "200KB", "seed": 3},
    "cells_of_one_patch": {"vision": {"spatial_merge_size": 1, "window_size": 24, "fullatt_block_indexes": [2]}},
    "state_dict_names": {"names": "state_dict", "image_settings": {"min_pixels": 1, "max_pixels": 30 * 16**2}},
}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strip": ("Read.", [(8, 400)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}
_PROCESSOR, _PATCHES = "processor_config.json", "visual.patch_embed.proj.weight"

ROW = Row(
    "qwen2_5_vl",
    save_tiny_qwen25_vl,
    CONFIGS,
    CASES,
    compared=("windows_and_one_full_layer",),
    probed=("windows_and_one_full_layer",),
    spared={
        "calibration": "cells and a decoder as those of qwen2_vl",
        "int8_cache": "qwen2_vl's decoder and positions",
        "segments": "qwen2_vl's decoder and positions",
        "speculation": "qwen2_vl's decoder and positions",
    },
    placeholder="<|image_pad|>",
    tokens=("<|vision_start|>", "<|vision_end|>"),
    bad=(
        Bad("out_hidden_size 48", sets("vision_config", out_hidden_size=48)),
        Bad("window_size 8 is smaller", sets("vision_config", window_size=8)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("in_channels = 4", sets("vision_config", in_channels=4)),
        Bad("patch_size is 8, the vision tower's 7", sets("vision_config", patch_size=7)),
        Bad("merge_size is 1", sets("image_processor", merge_size=1), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad(
            _PATCHES,
            lambda weights: weights.update({_PATCHES: weights[_PATCHES][:, :, :1].copy()}),
            "model.safetensors",
            "WeightsError",
            also=("[48, 3, 1, 8, 8]", "[48, 3, 2, 8, 8]"),
        ),
    ),
    needed=(
        Tensor("model.layers.1.self_attn.k_proj.bias"),
        Tensor("visual.blocks.1.mlp.gate_proj.bias"),
        Tensor("visual.merger.ln_q.weight"),
        Tensor(_PATCHES),
    ),
    unneeded=(
        Tensor("visual.blocks.3.norm1.weight"),
        Tensor("visual.blocks.1.norm1.bias"),
        Tensor("model.layers.9.mlp.up_proj.weight"),
    ),
)
