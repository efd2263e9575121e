"""Qwen2.5-VL."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row
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
_PROCESSOR = "processor_config.json"

ROW = Row(
    "qwen2_5_vl",
    save_tiny_qwen25_vl,
    CONFIGS,
    CASES,
    compared=("windows_and_one_full_layer",),
    probed=("windows_and_one_full_layer",),
    placeholder="<|image_pad|>",
    bad=(
        Bad("out_hidden_size 48", lambda c: c["vision_config"].update(out_hidden_size=48)),
        Bad("window_size 8 is smaller", lambda c: c["vision_config"].update(window_size=8)),
        Bad("hidden_act = 'swish'", lambda c: c["vision_config"].update(hidden_act="swish")),
        Bad("in_channels = 4", lambda c: c["vision_config"].update(in_channels=4)),
        Bad("patch_size is 8, the vision tower's 7", lambda c: c["vision_config"].update(patch_size=7)),
        Bad("merge_size is 1", lambda c: c["image_processor"].update(merge_size=1), _PROCESSOR),
        Bad("do_rescale", lambda c: c["image_processor"].update(do_rescale=False), _PROCESSOR),
        Bad("do_resize", lambda c: c["image_processor"].update(do_resize=False), _PROCESSOR),
    ),
)
