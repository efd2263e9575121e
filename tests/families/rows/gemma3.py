"""Gemma 3."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_gemma3 import save_tiny_gemma3

CONFIGS: dict[str, dict[str, Any]] = {
    "window": {},
    "every_patch_no_template": {
        "config": {"mm_tokens_per_image": 36},
        "text": {"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]},
        "vision": {"vision_use_head": True},
        "template": None,
    },
    "one_token_sharded": {"config": {"mm_tokens_per_image": 1}, "shard_size": "200KB", "seed": 3},
    "published_names": {"names": "hub", "image_settings": {"resample": 3, "image_mean": [0.4, 0.5, 0.6]}},
    "state_dict_names_untied": {"names": "state_dict", "config": {"tie_word_embeddings": False}},
}
CASES = {
    **PROMPTS,
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "gemma3",
    save_tiny_gemma3,
    CONFIGS,
    CASES,
    compared=("window",),
    probed=("window",),
    refused={"cuda": "GroupQueryAttention with attention_bias"},
    spared={
        "calibration": "tower as that of llava; the decoder is one of llava's",
        "eight_bits": "tower as that of llava; the decoder is one of llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    placeholder="<image_soft_token>",
    tokens=("<start_of_image>", "<end_of_image>"),
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("mm_tokens_per_image 8", sets(mm_tokens_per_image=8)),
        Bad("mm_tokens_per_image 25", sets(mm_tokens_per_image=25)),
        Bad("sliding_window 8 is smaller", sets("text_config", sliding_window=8)),
        Bad("use_bidirectional_attention", sets("text_config", use_bidirectional_attention=True)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("do_pan_and_scan = True", sets("image_processor", do_pan_and_scan=True), _PROCESSOR),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_seq_length = 256", sets(image_seq_length=256), _PROCESSOR),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
    ),
    needed=(
        Tensor("multi_modal_projector.mm_input_projection_weight"),
        Tensor("multi_modal_projector.mm_soft_emb_norm.weight"),
        Tensor("vision_tower.post_layernorm.weight"),
        Tensor("language_model.model.norm.weight", told="model.language_model.norm.weight"),
    ),
    unneeded=(
        Tensor("multi_modal_projector.linear.weight"),
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
