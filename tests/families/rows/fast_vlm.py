"""FastVLM."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_fast_vlm import save_tiny_fast_vlm

TOWER = {"inference_mode": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "few_layers": {},
    "larger_images_no_template": {
        "vision": {
            "model_args": {**TOWER, "layers": [1, 2, 1, 2, 1], "embed_dims": [4, 4, 8, 32, 64]},
            "hidden_size": 128,
        },
        "image_settings": {"size": {"shortest_edge": 200}, "crop_size": {"height": 192, "width": 192}},
        "template": None,
    },
    "one_feature_tied_sharded": {
        "text": {"tie_word_embeddings": True},
        "config": {"tie_word_embeddings": True, "projector_hidden_act": "relu", "multimodal_projector_bias": False},
        "image_settings": {"size": {"height": 64, "width": 64}, "do_center_crop": False},
        "shard_size": "100KB",
        "seed": 3,
    },
    "state_dict_names": {"names": "state_dict"},
}
_PROCESSOR, _TOWER = "processor_config.json", "model.vision_tower.timm_model."


def _tower(**options: Any) -> Any:
    return lambda config: config["vision_config"]["model_args"].update(options)


ROW = Row(
    "fast_vlm",
    save_tiny_fast_vlm,
    CONFIGS,
    compared=("few_layers",),
    probed=("few_layers",),
    spared={
        "calibration": "a connector and a decoder as those of llava",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    bad=(
        Bad("architecture = 'fastvit_t8'", sets("vision_config", architecture="fastvit_t8")),
        Bad("inference_mode", _tower(inference_mode=False)),
        Bad("'mlp_ratios'", _tower(mlp_ratios=[3, 3, 3, 3, 3])),
        Bad("layers = [1, 1]", _tower(layers=[1, 1])),
        Bad("embed_dims = [4, 8, 16, 24, 48]", _tower(embed_dims=[4, 8, 16, 24, 48])),
        Bad("hidden_size 32, the tower makes 64", sets("vision_config", hidden_size=32)),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("vision feature layer: -2", sets(vision_feature_layer=-2)),
        Bad("feature strategy: default", sets(vision_feature_select_strategy="default")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("96 px, no multiple of 64", sets("image_processor", crop_size=96), _PROCESSOR),
        Bad("images of any size", sets("image_processor", do_center_crop=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("16 tokens for an image, the model makes 4", sets(patch_size=32), _PROCESSOR),
        Bad("stages.0.blocks.0.mlp.conv.conv", _tower(embed_dims=[8, 8, 16, 32, 32]), error="WeightsError"),
    ),
    needed=(
        Tensor(f"{_TOWER}final_conv.se.fc1.weight"),
        Tensor(f"{_TOWER}stages.2.blocks.0.mlp.conv.bn.running_var"),
        Tensor(f"{_TOWER}stages.4.blocks.0.layer_scale_2.gamma"),
        Tensor("model.multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(
        Tensor(f"{_TOWER}stages.2.blocks.1.layer_scale.gamma"),
        Tensor(f"{_TOWER}head.fc.weight"),
        Tensor("model.language_model.layers.7.mlp.up_proj.weight"),
    ),
)
