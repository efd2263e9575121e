"""LLaVA-NeXT-Video: images as those of LLaVA-NeXT; videos are in `test_llava_videos.py`."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_llava_line import save_tiny_llava_next_video

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral_sharded": {"text": {"model_type": "mistral"}, "shard_size": "200KB", "seed": 3},
    "no_videos_no_template": {"video_settings": None, "template": None, "names": "state_dict"},
    "hub_names": {"names": "hub"},
}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(300, 40)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR, _VIDEOS = "processor_config.json", "video_preprocessor_config.json"

ROW = Row(
    "llava_next_video",
    save_tiny_llava_next_video,
    CONFIGS,
    CASES,
    compared=("llama",),
    probed=("llama",),
    spared={
        "calibration": "tower and decoder as those of llava",
        "eight_bits": "tower and decoder as those of llava",
        "int8_cache": "a decoder as llava's",
        "segments": "a decoder as llava's",
        "speculation": "a decoder as llava's",
    },
    bad=(
        Bad("spatial_pool_mode = 'max'", sets(spatial_pool_mode="max")),
        Bad("spatial_pool_stride = 3", sets(spatial_pool_stride=3)),
        Bad("vision_feature_select_strategy = 'full' makes 37 features", sets(vision_feature_select_strategy="full")),
        Bad("vision_feature_layer = 9", sets(vision_feature_layer=9)),
        Bad("image_grid_pinpoints of model", sets(image_grid_pinpoints=[[48, 48]])),
        Bad("video_token_index = 3", sets(video_token_index=3)),
        Bad("no text_config", lambda c: c.pop("text_config")),
        Bad("35 tokens for an image, the model makes 36", sets(num_additional_image_tokens=0), _PROCESSOR),
        Bad("40×40 px", sets("image_processor", crop_size=40), _PROCESSOR),
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
        Tensor("image_newline"),
        Tensor("language_model.model.embed_tokens.weight", told="model.language_model.embed_tokens.weight"),
        Tensor("multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("multi_modal_projector.linear_3.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
