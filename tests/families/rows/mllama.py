"""Llama 3.2 Vision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row
from tests.tiny_mllama import save_tiny_mllama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "four_tiles": {"text": {"cross_attention_layers": [1, 3]}},
    "published_names_llama3_rope": {"names": "hub", "text": {"rope_parameters": LLAMA3}},
    "two_tiles_last_layer_tied": {
        "vision": {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        "text": {"cross_attention_layers": [1], "num_hidden_layers": 2, "tie_word_embeddings": True},
        "config": {"tie_word_embeddings": True},
    },
    "one_tap_sharded": {
        "vision": {"intermediate_layers_indices": [1], "vision_output_dim": 96, "patch_size": 12, "norm_eps": 1e-2},
        "text": {"num_key_value_heads": 4, "cross_attention_layers": [2, 3]},
        "shard_size": "200KB",
        "seed": 3,
    },
    "no_template_bicubic": {
        "template": None,
        "names": "state_dict",
        "image_settings": {"resample": 3, "image_mean": [0.4, 0.5, 0.6]},
    },
}
CASES = {
    **PROMPTS,
    "one_tile": ("What?", [(13, 21)]),
    "wide_strip": ("Read.", [(3, 350)]),
    "tall": ("What does it say?", [(301, 60)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}
_PROCESSOR = "processor_config.json"


def _vision(**change: Any) -> Any:
    return lambda config: config["vision_config"].update(change)


def _images(**change: Any) -> Any:
    return lambda config: config["image_processor"].update(change)


ROW = Row(
    "mllama",
    save_tiny_mllama,
    CONFIGS,
    CASES,
    compared=("four_tiles",),
    probed=("four_tiles",),
    placeholder="<|image|>",
    bad=(
        Bad("max_image_tiles is 3", _images(max_image_tiles=3), _PROCESSOR),
        Bad("size is (28, 28)", _images(size={"height": 28, "width": 28}), _PROCESSOR),
        Bad("do_rescale", _images(do_rescale=False), _PROCESSOR),
        Bad(
            "supported_aspect_ratios [[1, 1], [2, 1]", _vision(supported_aspect_ratios=[[1, 1], [2, 1], *[[1, 2]] * 6])
        ),
        Bad("0 layers of cross-attention", lambda c: c["text_config"].update(cross_attention_layers=[9])),
        Bad("vision_output_dim 96", _vision(vision_output_dim=96)),
        Bad("intermediate_layers_indices [9]", _vision(intermediate_layers_indices=[9])),
        Bad("num_channels = 4", _vision(num_channels=4)),
        Bad("hidden_act = 'swish'", _vision(hidden_act="swish")),
    ),
)
