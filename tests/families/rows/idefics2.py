"""Idefics2."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_idefics2 import save_tiny_idefics2

CONFIGS: dict[str, dict[str, Any]] = {
    "quarters": {},
    "whole_no_template_sharded": {
        "image_settings": {"do_image_splitting": False, "size": {"shortest_edge": 30, "longest_edge": 100}},
        "perceiver": {"resampler_n_latents": 1, "resampler_depth": 1, "num_key_value_heads": 4},
        "template": None,
        "shard_size": "200KB",
        "seed": 3,
    },
    "larger_than_trained": {
        "vision": {"image_size": 40, "hidden_act": "gelu"},
        "image_settings": {"size": {"shortest_edge": 33, "longest_edge": 77}, "resample": 3},
        "perceiver": {"hidden_act": "gelu", "num_key_value_heads": 1},
    },
    "published_files": {"names": "hub"},
    "state_dict_names": {"names": "state_dict", "text": {"sliding_window": 32}},
}
CASES = {
    **PROMPTS,
    "tall": ("<tall>", [(211, 23)]),
    "small": (" What?", [(2, 3)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "idefics2",
    save_tiny_idefics2,
    CONFIGS,
    CASES,
    compared=("quarters",),
    probed=("quarters",),
    spared={
        "calibration": "the tower is LFM2-VL's, the decoder one of llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    tokens=("<fake_token_around_image>",),
    bad=(
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("'gelu_new'", sets("perceiver_config", hidden_act="gelu_new")),
        Bad("resampler_n_heads 4 share num_key_value_heads 3", sets("perceiver_config", num_key_value_heads=3)),
        Bad("resampler_depth = 0", sets("perceiver_config", resampler_depth=0)),
        Bad("'gpt_neox'", sets("text_config", model_type="gpt_neox")),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("image_seq_len = 64", sets(image_seq_len=64), _PROCESSOR),
        Bad("do_pad is false", sets("image_processor", do_pad=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("patches are of 8 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("position_embedding", sets("vision_config", image_size=96), error="WeightsError"),
    ),
    needed=(
        Tensor("model.connector.perceiver_resampler.latents"),
        Tensor("model.connector.perceiver_resampler.layers.1.self_attn.o_proj.weight"),
        Tensor("model.connector.modality_projection.gate_proj.weight"),
        Tensor("model.vision_model.embeddings.patch_embedding.bias"),
        Tensor("lm_head.weight"),
    ),
    unneeded=(
        Tensor("model.connector.perceiver_resampler.layers.7.mlp.up_proj.weight"),
        Tensor("model.vision_model.head.probe"),
    ),
)
