"""PerceptionLM."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_perception_lm import save_tiny_perception_lm

LLAMA3 = {
    "rope_parameters": {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    }
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiles_and_the_whole": {"text": LLAMA3, "config": {"tie_word_embeddings": True}, "video_settings": {}},
    "without_class_token": {
        "architecture": "vit_pe_core_gigantic_patch14_448",
        "tower": {"img_size": [84, 84], "ref_feat_shape": [4, 4], "use_post_transformer_norm": True},
        "config": {"projector_pooling_ratio": 3},
        "image_settings": {"max_num_tiles": 6, "image_std": [0.3, 0.4, 0.5]},
        "template": None,
        "seed": 1,
    },
    "one_tile_sharded": {
        "image_settings": {"vision_input_type": "vanilla", "resample": 2},
        "config": {"projector_pooling_ratio": 1},
        "shard_size": "200KB",
    },
    "state_dict_names": {"names": "state_dict", "image_settings": {"max_num_tiles": 1}},
}
CASES = {
    **PROMPTS,
    "larger_than_all_tiles": ("What does it say?", [(400, 150)]),
    "grids_of_several_sizes": ("Compare.", [(300, 500), (20, 20), (56, 112)]),
}
_IMAGES, _TOWER = "preprocessor_config.json", "model.vision_tower.timm_model."


def _tower(**options: Any) -> Any:
    return lambda config: config["vision_config"]["model_args"].update(options)


ROW = Row(
    "perception_lm",
    save_tiny_perception_lm,
    CONFIGS,
    CASES,
    compared=("tiles_and_the_whole",),
    probed=("tiles_and_the_whole",),
    spared={
        "calibration": "a connector and a decoder as those of llava",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets(vision_config={"model_type": "clip_vision_model"})),
        Bad(
            "architecture = 'vit_pe_core_base_patch16_224'",
            sets("vision_config", architecture="vit_pe_core_base_patch16_224"),
        ),
        Bad("global_pool", _tower(global_pool="map")),
        Bad("init_values", _tower(init_values=None)),
        Bad("'qk_norm': True", _tower(qk_norm=True)),
        Bad("embed_dim = 96", _tower(embed_dim=96)),
        Bad("model_args has img_size", _tower(img_size=[56, 70])),
        Bad("model_args has ref_feat_shape", _tower(ref_feat_shape=None)),
        Bad("vision_use_cls_token = False, and the tower has a class token", sets(vision_use_cls_token=False)),
        Bad("projector_pooling_ratio = 3 of 4 patches", sets(projector_pooling_ratio=3)),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("video_token_id = 3", sets(video_token_id=3)),
        Bad("tiles of 70×70 px", sets(tile_size=70), _IMAGES),
        Bad("max_num_tiles is 0", sets(max_num_tiles=0), _IMAGES),
        Bad("vision_input_type is 'tile'", sets(vision_input_type="tile"), _IMAGES),
        Bad("do_resize is false", sets(do_resize=False), _IMAGES),
        Bad("do_rescale", sets(do_rescale=False), _IMAGES),
        Bad("image processor 'CLIPImageProcessor'", sets(image_processor_type="CLIPImageProcessor"), _IMAGES),
        Bad("give 1 tokens, the model makes 4", sets(patch_size=28), "processor_config.json"),
        Bad("processor_class 'CLIPProcessor'", sets(processor_class="CLIPProcessor"), "processor_config.json"),
        Bad("tiles of 28×28 px", sets(size={"height": 28, "width": 28}), "video_preprocessor_config.json"),
        Bad("pos_embed", _tower(img_size=[84, 84]), error="WeightsError", also=("[1, 17, 128]", "[1, 37, 128]")),
    ),
    needed=(
        Tensor(f"{_TOWER}blocks.1.gamma_2"),
        Tensor(f"{_TOWER}blocks.0.attn.qkv.bias"),
        Tensor(f"{_TOWER}cls_token"),
        Tensor(f"{_TOWER}norm_pre.weight"),
        Tensor("model.multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(
        Tensor(f"{_TOWER}blocks.2.gamma_2"),
        Tensor(f"{_TOWER}attn_pool.latent"),
        Tensor("model.language_model.layers.7.mlp.up_proj.weight"),
    ),
    placeholder="<|image|>",
)
