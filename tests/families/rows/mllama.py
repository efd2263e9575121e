"""Llama 3.2 Vision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
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


ROW = Row(
    "mllama",
    save_tiny_mllama,
    CONFIGS,
    CASES,
    compared=("four_tiles",),
    probed=("four_tiles",),
    spared={"calibration": "its layers of self-attention are those of llava"},
    placeholder="<|image|>",
    bad=(
        Bad("max_image_tiles is 3", sets("image_processor", max_image_tiles=3), _PROCESSOR),
        Bad("size is (28, 28)", sets("image_processor", size={"height": 28, "width": 28}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad(
            "supported_aspect_ratios [[1, 1], [2, 1]",
            sets("vision_config", supported_aspect_ratios=[[1, 1], [2, 1], *[[1, 2]] * 6]),
        ),
        Bad("0 layers of cross-attention", sets("text_config", cross_attention_layers=[9])),
        Bad("vision_output_dim 96", sets("vision_config", vision_output_dim=96)),
        Bad("intermediate_layers_indices [9]", sets("vision_config", intermediate_layers_indices=[9])),
        Bad("num_channels = 4", sets("vision_config", num_channels=4)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad(
            "gated_positional_embedding",
            sets("vision_config", patch_size=6),
            error="WeightsError",
            also=("[10, 48]", "[17, 48]"),
        ),
        Bad("cross_attn", sets("text_config", cross_attention_layers=[1, 2]), error="WeightsError"),
    ),
    needed=(
        Tensor("language_model.model.layers.1.cross_attn_attn_gate"),
        Tensor("language_model.model.layers.3.cross_attn.k_norm.weight"),
        Tensor("vision_model.global_transformer.layers.1.gate_ffn"),
        Tensor("vision_model.pre_tile_positional_embedding.embedding.weight"),
        Tensor("multi_modal_projector.bias"),
    ),
    unneeded=(
        Tensor("language_model.model.layers.2.cross_attn_attn_gate"),
        Tensor("vision_model.global_transformer.layers.2.gate_ffn"),
        Tensor("vision_model.patch_embedding.bias"),
    ),
)
