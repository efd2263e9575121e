"""LLaVA-OneVision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row
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
    bad=(
        Bad("vision_aspect_ratio = 'anyres'", lambda c: c.update(vision_aspect_ratio="anyres")),
        Bad("the model's 'anyres_max_9'", lambda c: c.update(vision_aspect_ratio="anyres_max_9")),
        Bad("vision_feature_select_strategy", lambda c: c.update(vision_feature_select_strategy="default")),
        Bad("vision_feature_layer = 9", lambda c: c.update(vision_feature_layer=9)),
        Bad("image_grid_pinpoints", lambda c: c.update(image_grid_pinpoints=[[48, 48]])),
        Bad("projector_hidden_act = 'swish'", lambda c: c.update(projector_hidden_act="swish")),
        Bad("num_image_tokens = 729", lambda c: c.update(num_image_tokens=729), _PROCESSOR),
        Bad("56×56 px", lambda c: c["image_processor"].update(size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", lambda c: c["image_processor"].update(do_rescale=False), _PROCESSOR),
        Bad("resample", lambda c: c["image_processor"].update(resample=9), _PROCESSOR),
        Bad("<picture>", lambda c: c.update(image_token="<picture>"), _PROCESSOR),
    ),
)
