"""LFM2-VL."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row
from tests.tiny_lfm2_vl import save_tiny_lfm2_vl

CONFIGS: dict[str, dict[str, Any]] = {
    "tiles_and_the_whole": {},
    "untied_sharded": {
        "config": {"tie_word_embeddings": False, "projector_bias": False},
        "vision": {"num_patches": 36, "vision_use_head": True},
        "shard_size": "200KB",
        "seed": 2,
    },
    "without_the_whole": {
        "image_settings": {"use_thumbnail": False, "image_std": [0.3, 0.4, 0.5]},
        "config": {"projector_use_layernorm": False},
        "template": None,
    },
    "never_cut": {
        "image_settings": {"do_image_splitting": False, "max_image_tokens": 40},
        "text": {"layer_types": ["full_attention", "conv", "full_attention"], "conv_bias": True},
    },
    "cells_of_one_patch": {
        "config": {"downsample_factor": 1, "projector_hidden_act": "relu", "tie_word_embeddings": False},
        "vision": {"num_patches": 1},
        "names": "state_dict",
    },
    "as_on_the_hub": {"names": "hub", "template": None, "seed": 1},
    "cells_of_nine_patches": {
        "config": {"downsample_factor": 3},
        "vision": {"patch_size": 4, "num_hidden_layers": 1},
        "image_settings": {"tile_size": 24, "max_pixels_tolerance": 1.3, "max_image_tokens": 9},
    },
}
CASES = {
    **PROMPTS,
    "tall_in_tiles": ("What does it say?", [(301, 60)]),
    "one_pixel": ("Read.", [(1, 1)]),
    "tiles_and_small_ones": ("Compare.", [(40, 40), (150, 190), (9, 10), (20, 55)]),
}
_IMAGES = "preprocessor_config.json"

ROW = Row(
    "lfm2_vl",
    save_tiny_lfm2_vl,
    CONFIGS,
    CASES,
    compared=("tiles_and_the_whole",),
    probed=("tiles_and_the_whole",),
    bad=(
        Bad("encoder_patch_size is 8, the vision tower's 4", lambda c: c["vision_config"].update(patch_size=4)),
        Bad("downsample_factor is 2, the model's 3", lambda c: c.update(downsample_factor=3)),
        Bad("num_patches 15 is no square", lambda c: c["vision_config"].update(num_patches=15)),
        Bad("projector_hidden_act = 'swish'", lambda c: c.update(projector_hidden_act="swish")),
        Bad("image_token_id = 3", lambda c: c.update(image_token_id=3)),
        Bad(
            "image processor 'CLIPImageProcessor'",
            lambda c: c.update(image_processor_type="CLIPImageProcessor"),
            _IMAGES,
        ),
        Bad("large images into 1 to 4 tiles", lambda c: c.update(min_tiles=1), _IMAGES),
        Bad("tiles of 65 px and cells of 16 px", lambda c: c.update(tile_size=65), _IMAGES),
        Bad("makes 17 to 16 tokens", lambda c: c.update(min_image_tokens=17), _IMAGES),
        Bad("max_image_tokens is '16'", lambda c: c.update(max_image_tokens="16"), _IMAGES),
        Bad("max_pixels_tolerance is 0", lambda c: c.update(max_pixels_tolerance=0), _IMAGES),
        Bad("resample is bicubic", lambda c: c.update(resample=3), _IMAGES),
        Bad("do_pad is false", lambda c: c.update(do_pad=False), _IMAGES),
        Bad("do_rescale", lambda c: c.update(do_rescale=False), _IMAGES),
        Bad(
            "processor_class 'CLIPProcessor'",
            lambda c: c.update(processor_class="CLIPProcessor"),
            "processor_config.json",
        ),
    ),
)
