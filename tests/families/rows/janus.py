"""Janus."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_janus import save_tiny_janus

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied_no_template": {
        "config": {"tie_word_embeddings": True},
        "vision": {"depth": 3, "hidden_act": "gelu_pytorch_tanh"},
        "template": None,
    },
    "no_system_prompt_sharded": {"system_prompt": False, "shard_size": "200KB", "seed": 3},
    "one_layer_aligner": {"vision": {"depth": 1, "image_size": 54}, "image_settings": {"min_size": 20, "resample": 2}},
    "state_dict_names": {"names": "state_dict", "text": {"num_key_value_heads": 4}},
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "janus",
    save_tiny_janus,
    CONFIGS,
    CASES,
    compared=("llama",),
    probed=("llama",),
    spared={
        "calibration": "tower and decoder as those of llava",
        "eight_bits": "tower and decoder as those of llava",
        "int8_cache": "llava's decoder",
        "segments": "llava's decoder",
        "speculation": "llava's decoder",
    },
    placeholder="<image_placeholder>",
    bad=(
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("use_qk_norm = True", sets("vision_config", use_qk_norm=True)),
        Bad("attention_bias = False", sets("vision_config", attention_bias=False)),
        Bad("projection_dim = 32", sets("vision_config", projection_dim=32)),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_pad", sets("image_processor", do_pad=False), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("min_size 49", sets("image_processor", min_size=49), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("num_image_tokens = 576", sets(num_image_tokens=576), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
    ),
    needed=(
        Tensor("model.aligner.hidden_layers.0.weight"),
        Tensor("model.vision_model.encoder.layers.0.self_attn.projection_layer.weight"),
        Tensor("lm_head.weight"),
    ),
    unneeded=(
        Tensor("model.aligner.hidden_layers.1.weight"),
        Tensor("model.vision_model.encoder.layers.7.mlp.fc1.weight"),
        Tensor("model.language_model.layers.7.mlp.up_proj.weight"),
    ),
)
