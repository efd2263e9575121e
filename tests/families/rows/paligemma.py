"""PaliGemma."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_paligemma import save_tiny_paligemma

GEMMA2 = {
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 24,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {"seed": 1},  # its answers repeat words, which are guessed
    "gemma2_window": {"text": GEMMA2},
    "head_of_the_tower_sharded": {"vision": {"vision_use_head": True}, "shard_size": "200KB", "seed": 3},
    "published_names": {"names": "hub", "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
    "state_dict_names_untied": {
        "names": "state_dict",
        "vision": {"image_size": 54},
        "config": {"tie_word_embeddings": False},
    },
}
CASES = {**PROMPTS, "large": ("Describe.", [(401, 517)]), "pixel": ("caption en", [(1, 1)])}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "paligemma",
    save_tiny_paligemma,
    CONFIGS,
    CASES,
    compared=("gemma", "gemma2_window"),
    probed=("gemma2_window",),
    refused={"cuda": "GroupQueryAttention with attention_bias"},
    spared={
        "calibration": "tower as that of llava; the decoder is one of llava's",
        "eight_bits": "tower as that of llava; the decoder is one of llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    bad=(
        Bad("vision_config.model_type = 'clip_vision_model'", sets("vision_config", model_type="clip_vision_model")),
        Bad("projection_dim 48", sets(projection_dim=48)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_seq_length = 256", sets("image_processor", image_seq_length=256), _PROCESSOR),
        Bad("image_seq_length", lambda c: c["image_processor"].pop("image_seq_length"), _PROCESSOR),
        Bad("chat template", sets(chat_template="{{ messages }}"), _PROCESSOR),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
    ),
    needed=(
        Tensor("multi_modal_projector.linear.bias"),
        Tensor("vision_tower.post_layernorm.weight"),
        Tensor("language_model.model.norm.weight", told="model.language_model.norm.weight"),
    ),
    unneeded=(
        Tensor("multi_modal_projector.linear_2.weight"),
        Tensor("vision_tower.encoder.layers.7.mlp.fc1.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
