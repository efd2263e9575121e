"""ViP-LLaVA."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_llava_line import save_tiny_vipllava

CONFIGS: dict[str, dict[str, Any]] = {
    "three_layers": {},
    "one_layer_no_template": {"config": {"vision_feature_layer": -2}, "template": None},
    "larger_epsilon_sharded": {"config": {"projector_layernorm_eps": 0.5}, "shard_size": "200KB", "seed": 3},
    "last_layers_hub_names": {"config": {"vision_feature_layer": [-1, 0]}, "names": "hub"},
    "siglip_drops_a_patch": {
        "vision": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "names": "state_dict",
    },
}
_PROCESSOR = "processor_config.json"
_LLAVA = "as llava, but for a norm"

ROW = Row(
    "vipllava",
    save_tiny_vipllava,
    CONFIGS,
    compared=("three_layers",),
    probed=("three_layers",),
    spared={
        "calibration": "layers as those of llava, behind norms as in every tower",
        "eight_bits": "layers as those of llava, behind norms as in every tower",
        "int8_cache": _LLAVA,
        "segments": _LLAVA,
        "speculation": _LLAVA,
    },
    bad=(
        Bad("vision_feature_layer = [1, 4]", sets(vision_feature_layer=[1, 4])),
        Bad("vision_feature_layer = 0", sets(vision_feature_layer=0)),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("vision_config.model_type = 'dinov2'", sets("vision_config", model_type="dinov2")),
        Bad("no text_config", lambda c: c.pop("text_config")),
        Bad("56×56 px, the vision tower takes 48×48 px", sets("image_processor", crop_size=56), _PROCESSOR),
        Bad("do_normalize", sets("image_processor", do_normalize=False), _PROCESSOR),
        Bad("37 tokens for an image, the model makes 36", sets(vision_feature_select_strategy="full"), _PROCESSOR),
        Bad("ViTImageProcessor", sets("image_processor", image_processor_type="ViTImageProcessor"), _PROCESSOR),
        Bad(
            "multi_modal_projector.projector_layernorm.weight",
            sets(vision_feature_layer=[-2, 1]),
            error="WeightsError",
            also=("[192]", "[128]"),
        ),
    ),
    needed=(
        Tensor("multi_modal_projector.projector_layernorm.bias"),
        Tensor("multi_modal_projector.linear_1.weight"),
        Tensor("vision_tower.encoder.layers.1.mlp.fc1.bias"),
    ),
    unneeded=(
        Tensor("multi_modal_projector.linear_3.weight"),
        Tensor("vision_tower.class_head.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
