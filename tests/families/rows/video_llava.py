"""Video-LLaVA: images; videos are in `test_llava_videos.py`."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_llava_line import save_tiny_video_llava

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "several_layers_full_sharded": {
        "config": {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
        "shard_size": "200KB",
        "seed": 3,
    },
    "no_videos_no_template": {"video_settings": None, "template": None, "names": "state_dict"},
    "hub_names": {"names": "hub", "image_settings": {"size": {"shortest_edge": 57}, "resample": 2}},
}
_PROCESSOR, _VIDEOS = "processor_config.json", "video_preprocessor_config.json"

ROW = Row(
    "video_llava",
    save_tiny_video_llava,
    CONFIGS,
    compared=("llama",),
    probed=("llama",),
    spared={
        "calibration": "towers and decoder as those of llava",
        "eight_bits": "towers and decoder as those of llava",
        "int8_cache": "a decoder as llava's",
        "segments": "a decoder as llava's",
        "speculation": "a decoder as llava's",
    },
    bad=(
        Bad("vision_feature_layer = 9", sets(vision_feature_layer=9)),
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("vision_config.model_type = 'dinov2'", sets("vision_config", model_type="dinov2")),
        Bad("video_token_index = 3", sets(video_token_index=3)),
        Bad("no text_config", lambda c: c.pop("text_config")),
        Bad("35 tokens for an image, the model makes 36", sets(num_additional_image_tokens=0), _PROCESSOR),
        Bad(
            "38 tokens for a frame",
            sets(num_additional_image_tokens=2, vision_feature_select_strategy="default"),
            _PROCESSOR,
            config="several_layers_full_sharded",
        ),
        Bad("40×40 px", sets("image_processor", crop_size={"height": 40, "width": 40}), _PROCESSOR),
        Bad("<picture>", sets(image_token="<picture>"), _PROCESSOR),
        Bad("56×56 px", sets(crop_size=56), _VIDEOS),
        Bad("do_normalize", sets(do_normalize=False), _VIDEOS),
        Bad("Qwen2VLVideoProcessor", sets(video_processor_type="Qwen2VLVideoProcessor"), _VIDEOS),
        Bad(
            "mlp.gate_proj",
            sets("text_config", intermediate_size=256),
            error="WeightsError",
            also=("[128, 64]", "[256, 64]"),
        ),
    ),
    needed=(
        Tensor("image_tower.encoder.layers.1.mlp.fc1.bias"),
        Tensor("video_tower.encoder.layers.1.mlp.fc1.bias"),
        Tensor("multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(
        Tensor("image_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("video_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("multi_modal_projector.linear_3.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
