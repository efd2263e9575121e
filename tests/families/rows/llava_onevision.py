"""LLaVA-OneVision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_onevision import save_tiny_onevision

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "tied_no_template": {
        "text": {"tie_word_embeddings": True},
        "config": {"tie_word_embeddings": True},
        "template": None,
    },
    "llama_never_shrinks": {"text": {"model_type": "llama"}, "config": {"vision_aspect_ratio": "anyres_max_99"}},
    "few_features_sharded": {"config": {"vision_aspect_ratio": "anyres_max_1"}, "shard_size": "200KB", "seed": 3},
    "inner_layers": {"config": {"vision_feature_layer": [-2, 1]}, "names": "state_dict"},
    "odd_side": {"vision": {"image_size": 56}, "config": {"image_grid_pinpoints": [[56, 56], [112, 56], [168, 112]]}},
    "bilinear": {
        "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6]},
        "config": {"projector_hidden_act": "relu"},
    },
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
    "llava_onevision",
    save_tiny_onevision,
    CONFIGS,
    CASES,
    compared=("qwen2",),
    probed=("qwen2",),
    spared={
        "calibration": "tower and decoder as those of llava",
        "eight_bits": "tower and decoder as those of llava",
        "int8_cache": "a decoder as internvl's",
        "segments": "a decoder as llava's, with the biases of qwen2_vl's",
        "speculation": "a decoder as llava's, with the biases of qwen2_vl's",
    },
    bad=(
        Bad("vision_aspect_ratio = 'anyres'", sets(vision_aspect_ratio="anyres")),
        Bad("the model's 'anyres_max_9'", sets(vision_aspect_ratio="anyres_max_9")),
        Bad("vision_feature_select_strategy", sets(vision_feature_select_strategy="default")),
        Bad("vision_feature_layer = 9", sets(vision_feature_layer=9)),
        Bad("image_grid_pinpoints", sets(image_grid_pinpoints=[[48, 48]])),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("num_image_tokens = 729", sets(num_image_tokens=729), _PROCESSOR),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("<picture>", sets(image_token="<picture>"), _PROCESSOR),
        Bad(
            "mlp.gate_proj",
            sets("text_config", intermediate_size=256),
            error="WeightsError",
            also=("[128, 64]", "[256, 64]"),
        ),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
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
