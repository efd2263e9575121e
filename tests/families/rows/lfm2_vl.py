"""LFM2-VL."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
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
    rewindable=False,
    spared={
        "calibration": "tests/families/test_recurrent.py calibrates its decoder",
        "int8_cache": "what is recurrent is never truncated; test_recurrent.py has a cache in 8 bits beside it",
        "speculation": "it is refused, which test_batches.py shows",
    },
    bad=(
        Bad("encoder_patch_size is 8, the vision tower's 4", sets("vision_config", patch_size=4)),
        Bad("downsample_factor is 2, the model's 3", sets(downsample_factor=3)),
        Bad("num_patches 15 is no square", sets("vision_config", num_patches=15)),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad(
            "image processor 'CLIPImageProcessor'",
            sets(image_processor_type="CLIPImageProcessor"),
            _IMAGES,
        ),
        Bad("large images into 1 to 4 tiles", sets(min_tiles=1), _IMAGES),
        Bad("tiles of 65 px and cells of 16 px", sets(tile_size=65), _IMAGES),
        Bad("makes 17 to 16 tokens", sets(min_image_tokens=17), _IMAGES),
        Bad("max_image_tokens is '16'", sets(max_image_tokens="16"), _IMAGES),
        Bad("max_pixels_tolerance is 0", sets(max_pixels_tolerance=0), _IMAGES),
        Bad("resample is bicubic", sets(resample=3), _IMAGES),
        Bad("do_pad is false", sets(do_pad=False), _IMAGES),
        Bad("do_rescale", sets(do_rescale=False), _IMAGES),
        Bad(
            "processor_class 'CLIPProcessor'",
            sets(processor_class="CLIPProcessor"),
            "processor_config.json",
        ),
        Bad(
            "position_embedding",
            sets("vision_config", num_patches=25),
            error="WeightsError",
            also=("[16, 48]", "[25, 48]"),
        ),
        Bad("conv.conv.weight", sets("text_config", conv_L_cache=4), error="WeightsError"),
    ),
    needed=(
        Tensor("model.language_model.layers.2.conv.conv.weight"),
        Tensor("model.language_model.embedding_norm.weight"),
        Tensor("model.vision_tower.embeddings.position_embedding.weight"),
        Tensor("model.multi_modal_projector.layer_norm.bias"),
    ),
    unneeded=(
        Tensor("model.language_model.layers.2.conv.conv.bias"),
        Tensor("model.vision_tower.encoder.layers.2.layer_norm1.weight"),
        Tensor("model.multi_modal_projector.linear_3.weight"),
    ),
    tokens=("<|image_start|>", "<|image_end|>"),
)
