"""SmolVLM and Idefics3."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny import save_tiny_idefics3

WHOLE_TILE = {"do_image_splitting": False, "size": {"longest_edge": 64}}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped_query": {},
    "multi_head_tied": {"text": {"num_key_value_heads": 4}, "config": {"tie_word_embeddings": True}},
    "multi_query_single_tile": {"text": {"num_key_value_heads": 1}, "processor": WHOLE_TILE},
    "wide_heads": {"text": {"head_dim": 32}},
    "biases_scale_4": {"text": {"attention_bias": True, "mlp_bias": True}, "config": {"scale_factor": 4}},
    "rope_llama3": {
        "text": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        }
    },
    "rope_linear_3x3_tiles": {
        "text": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "processor": {"size": {"longest_edge": 192}},
    },
    "tile_unlike_trained_grid": {
        "vision": {"image_size": 96},
        "processor": {"max_image_size": {"longest_edge": 64}, "size": {"longest_edge": 128}},
    },
    "odd_grid_gelu": {"vision": {"image_size": 72, "patch_size": 6, "hidden_act": "gelu"}},
    "smolvlm_sharded": {"model_type": "smolvlm", "shard_size": "300KB", "seed": 3},
}

_PROCESSOR = "processor_config.json"


ROW = Row(
    "idefics3",
    save_tiny_idefics3,
    CONFIGS,
    compared=("grouped_query",),
    probed=("grouped_query", "smolvlm_sharded"),
    layouts=("grouped_query", "smolvlm_sharded"),
    bad=(
        Bad("'relu'", sets("text_config", hidden_act="relu")),
        Bad("pretraining_tp = 2", sets("text_config", pretraining_tp=2)),
        Bad("'gpt_neox'", sets("text_config", model_type="gpt_neox")),
        Bad("qk_layer_norms = True", sets("text_config", qk_layer_norms=True)),
        Bad("'proportional'", sets("text_config", rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})),
        Bad("vocab_size", sets("text_config", vocab_size=280)),
        Bad("'gelu_new'", sets("vision_config", hidden_act="gelu_new")),
        Bad("num_channels = 4", sets("vision_config", num_channels=4)),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("image_seq_len = 99", sets(image_seq_len=99), _PROCESSOR),
        Bad("60 px", lambda c: c["image_processor"]["max_image_size"].update(longest_edge=60), _PROCESSOR),
        Bad("do_normalize", sets("image_processor", do_normalize=False), _PROCESSOR),
        Bad("size", sets("image_processor", size={"height": 4}), _PROCESSOR),
        Bad(
            "gate_proj",
            sets("text_config", intermediate_size=256),
            error="WeightsError",
            also=("[128, 64]", "[256, 64]"),
        ),
    ),
    needed=(Tensor("model.text_model.layers.1.mlp.up_proj.weight"), Tensor("lm_head.weight")),
    unneeded=(Tensor("model.vision_model.head.probe"),),
)
