"""IDEFICS."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_idefics import save_tiny_idefics

CONFIGS: dict[str, dict[str, Any]] = {
    "every_layer": {},
    "every_second_vectors_sharded": {
        "text": {
            "cross_layer_interval": 2,
            "num_hidden_layers": 4,
            "alpha_type": "vector",
            "alpha_initializer": "ones",
            "qk_layer_norms": False,
        },
        "perceiver": {"resampler_n_latents": 1, "resampler_depth": 1, "qk_layer_norms_perceiver": False},
        "instruct": False,
        "shard_size": "200KB",
        "seed": 3,
    },
    "tied": {
        "text": {"tie_word_embeddings": True, "num_hidden_layers": 3, "cross_layer_interval": 3},
        "vision": {"image_size": 40, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
    },
    "published_files": {"names": "hub", "text": {"alpha_type": "vector"}},
    "state_dict_names": {"names": "state_dict", "image_settings": {"image_mean": [0.4, 0.5, 0.6], "resample": 2}},
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "pixel": (" What?", [(1, 1)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "idefics",
    save_tiny_idefics,
    CONFIGS,
    CASES,
    compared=("every_layer",),
    probed=("every_layer",),
    spared={"calibration": "its layers of self-attention are those of llava"},
    tokens=("<fake_token_around_image>",),
    bad=(
        Bad("use_resampler = False", sets(use_resampler=False)),
        Bad("cross_layer_interval 4, but 2 layers", sets(cross_layer_interval=4)),
        Bad("cross_layer_interval = 0", sets(cross_layer_interval=0)),
        Bad("hidden_act = 'gelu'", sets(hidden_act="gelu")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("num_channels = 4", sets("vision_config", num_channels=4)),
        Bad("resampler_depth = 0", sets("perceiver_config", resampler_depth=0)),
        Bad("token ids reach 260", sets(additional_vocab_size=2)),
        Bad("40×40 px", sets("image_processor", image_size=40), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("do_convert_rgb is false", sets("image_processor", do_convert_rgb=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("q_proj", sets("perceiver_config", resampler_n_heads=4), error="WeightsError"),
        Bad("k_layer_norm", sets(qk_layer_norms=False), error="WeightsError"),
        Bad("model.gated_cross_attn_layers.0.mlp.gate_proj.weight", sets(intermediate_size=100), error="WeightsError"),
        Bad("lm_head.weight", sets(vocab_size=300), error="WeightsError"),
    ),
    needed=(
        Tensor("model.perceiver_resampler.latents"),
        Tensor("model.perceiver_resampler.blocks.1.0.output_proj.weight"),
        Tensor("model.gated_cross_attn_layers.1.alpha_dense"),
        Tensor("model.gated_cross_attn_layers.0.cross_attn.k_proj.weight"),
        Tensor("model.embed_tokens.additional_embedding.weight"),
        Tensor("lm_head.additional_fc.weight"),
        Tensor("model.vision_model.pre_layrnorm.bias"),
    ),
    unneeded=(
        Tensor("model.gated_cross_attn_layers.2.alpha_dense"),
        Tensor("model.perceiver_resampler.blocks.7.1.fc.weight"),
        Tensor("model.layers.7.mlp.up_proj.weight"),
    ),
)
