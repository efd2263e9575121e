"""LLaVA-NeXT."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny import LLAVA_TEMPLATE
from tests.tiny_llava_line import save_tiny_llava_next
from tests.tiny_onevision import ONEVISION_TEMPLATE

CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral_no_template": {"template": None, "names": "state_dict"},
    "vicuna_sharded": {
        "text": {"model_type": "llama"},
        "template": LLAVA_TEMPLATE,
        "shard_size": "200KB",
        "seed": 3,
    },
    "vicuna_no_template": {"text": {"model_type": "llama"}, "template": None},
    "qwen2_chatml_hub_names": {"text": {"model_type": "qwen2"}, "template": ONEVISION_TEMPLATE, "names": "hub"},
    "siglip_several_layers": {
        "text": {"model_type": "llama"},
        "vision": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "config": {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
        "image_settings": {"size": {"height": 48, "width": 48}, "do_center_crop": False, "resample": 2},
    },
    "odd_side": {"vision": {"image_size": 56}, "config": {"image_grid_pinpoints": [[56, 56], [112, 56], [168, 112]]}},
}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(300, 40)]),
    "strip": ("Read.", [(3, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "llava_next",
    save_tiny_llava_next,
    CONFIGS,
    CASES,
    compared=("mistral",),
    probed=("mistral",),
    spared={
        "calibration": "tower and decoder as those of llava",
        "eight_bits": "tower and decoder as those of llava",
        "int8_cache": "a decoder as llava's",
        "segments": "a decoder as llava's",
        "speculation": "a decoder as llava's",
    },
    bad=(
        Bad("vision_feature_select_strategy = 'full' makes 37 features", sets(vision_feature_select_strategy="full")),
        Bad("vision_feature_layer = 9", sets(vision_feature_layer=9)),
        Bad("image_grid_pinpoints of model", sets(image_grid_pinpoints=[[48, 48]])),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("vision_config.model_type = 'dinov2'", sets("vision_config", model_type="dinov2")),
        Bad("no text_config", lambda c: c.pop("text_config")),
        Bad("35 tokens for an image, the model makes 36", sets(num_additional_image_tokens=0), _PROCESSOR),
        Bad("9 tokens for an image", sets(patch_size=16), _PROCESSOR),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("40×40 px", sets("image_processor", crop_size=40), _PROCESSOR),
        Bad("do_convert_rgb", sets("image_processor", do_convert_rgb=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("<picture>", sets(image_token="<picture>"), _PROCESSOR),
        Bad(
            "mlp.gate_proj",
            sets("text_config", intermediate_size=256),
            error="WeightsError",
            also=("[128, 64]", "[256, 64]"),
        ),
        Bad("position_embedding", sets("vision_config", hidden_size=32), error="WeightsError"),
    ),
    needed=(
        Tensor("image_newline"),
        Tensor("language_model.model.embed_tokens.weight", told="model.language_model.embed_tokens.weight"),
        Tensor("vision_tower.encoder.layers.1.mlp.fc1.bias"),
        Tensor("multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("multi_modal_projector.linear_3.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
