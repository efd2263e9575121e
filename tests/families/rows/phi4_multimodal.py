"""Phi-4 multimodal."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_phi4 import save_tiny_phi4

CONFIGS: dict[str, dict[str, Any]] = {
    "tiles_and_the_whole": {},
    "with_its_adapter_untied_sharded": {
        "adapter": True,
        "text": {"tie_word_embeddings": False, "sliding_window": 262144},
        "shard_size": "200KB",
        "seed": 1,
    },
    "last_layer_one_tile_no_template": {
        "vision": {"feature_layer": -1, "image_size": 96, "crop_size": 96},
        "image_settings": {"dynamic_hd": 1, "image_std": [0.3, 0.4, 0.5]},
        "template": None,
    },
    "state_dict_names": {
        "names": "state_dict",
        "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        "vision": {"feature_layer": -3},
    },
}
CASES = {
    **PROMPTS,
    "odd_rest": ("What does it say?", [(60, 101)]),
    "larger_than_all_tiles": ("Read.", [(400, 150)]),
}
_IMAGES, _TOWER = "preprocessor_config.json", "model.embed_tokens_extend.image_embed."

ROW = Row(
    "phi4_multimodal",
    save_tiny_phi4,
    CONFIGS,
    CASES,
    compared=("tiles_and_the_whole",),
    probed=("tiles_and_the_whole",),
    spared={
        "calibration": "a connector as those of llava, and phi3's decoder",
        "int8_cache": "phi3's decoder",
        "segments": "phi3's decoder",
        "speculation": "phi3's decoder",
    },
    bad=(
        Bad("feature_layer = 0", sets("vision_config", feature_layer=0)),
        Bad("feature_layer = -4", sets("vision_config", feature_layer=-4)),
        Bad("crop_size = 32 of images of 64 px", sets("vision_config", crop_size=32)),
        Bad("and 3 patches a side", sets("vision_config", patch_size=20)),
        Bad("image_token_id = 3", sets("vision_config", image_token_id=3)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("tiles of 32×32 px", sets(size={"height": 32, "width": 32}), _IMAGES),
        Bad("size is", sets(size={"height": 64, "width": 32}), _IMAGES),
        Bad("patch_size is 4, the vision tower's 8", sets(patch_size=4), _IMAGES),
        Bad("dynamic_hd is 0", sets(dynamic_hd=0), _IMAGES),
        Bad("resample is bilinear", sets(resample=2), _IMAGES),
        Bad("do_normalize", sets(do_normalize=False), _IMAGES),
        Bad("image processor 'CLIPImageProcessor'", sets(image_processor_type="CLIPImageProcessor"), _IMAGES),
        Bad("processor_class 'CLIPProcessor'", sets(processor_class="CLIPProcessor"), "processor_config.json"),
        Bad("qkv_proj", sets(num_key_value_heads=2), error="WeightsError"),
    ),
    needed=(
        Tensor(f"{_TOWER}img_projection_up.weight"),
        Tensor(f"{_TOWER}sub_img_feature_extensor"),
        Tensor(f"{_TOWER}global_img_feature_extensor"),
        Tensor(f"{_TOWER}img_processor.embeddings.position_embedding.weight"),
        Tensor("model.layers.1.self_attn.qkv_proj.weight"),
    ),
    unneeded=(
        Tensor(f"{_TOWER}img_projection_out.weight"),
        Tensor(f"{_TOWER}img_processor.encoder.layers.3.layer_norm1.weight"),
        Tensor("model.layers.7.mlp.down_proj.weight"),
    ),
    placeholder="<|endoftext10|>",
)
