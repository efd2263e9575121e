"""Qwen2-VL."""

import json
from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny import save_tiny_qwen2_vl

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mrope_section": [3, 3, 2],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped_query": {},
    "multi_head_tied": {"text": {"num_key_value_heads": 4}, "config": {"tie_word_embeddings": True}},
    "multi_query_old_files": {"text": {"num_key_value_heads": 1}, "names": "hub"},
    "tied_old_files": {"config": {"tie_word_embeddings": True}, "names": "hub"},
    "state_dict_names": {
        "names": "state_dict",
        "text": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5},
    },
    "sharded_one_layer": {"shard_size": "200KB", "seed": 3, "vision": {"depth": 1}},
    "cells_of_one_patch": {"vision": {"spatial_merge_size": 1, "hidden_act": "gelu"}},
    "cells_of_nine_patches": {"vision": {"spatial_merge_size": 3, "patch_size": 6, "num_heads": 3}},
    "one_frame": {"vision": {"temporal_patch_size": 1, "mlp_ratio": 4, "hidden_act": "gelu_pytorch_tanh"}},
    "one_cell_at_least": {"image_settings": {"min_pixels": 1, "max_pixels": 6 * 16**2}},
    "all_images_alike": {"image_settings": {"min_pixels": 40 * 16**2, "max_pixels": 40 * 16**2, "resample": 2}},
    "other_theta": {
        "vision": {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]}},
    },
    "yarn": {"text": {"rope_parameters": YARN}},
    "windowed": {"text": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}},
}

_PROCESSOR, _TOKENIZER, _WEIGHTS = "processor_config.json", "tokenizer.json", "model.safetensors"
_PATCHES = "visual.patch_embed.proj.weight"


def _rope(kind: str, **change: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **change}}


def _swap_placeholders(tokenizer: dict[str, Any]) -> None:
    """The image's has the video's id."""
    swapped = json.dumps(tokenizer).replace("<|image_pad|>", "<|swap|>").replace("<|video_pad|>", "<|image_pad|>")
    tokenizer.update(json.loads(swapped.replace("<|swap|>", "<|video_pad|>")))


ROW = Row(
    "qwen2_vl",
    save_tiny_qwen2_vl,
    CONFIGS,
    compared=("grouped_query",),
    probed=("grouped_query",),
    placeholder="<|image_pad|>",
    tokens=("<|vision_start|>", "<|vision_end|>"),
    bad=(
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("image_token_id", sets(image_token_id=None)),
        Bad("<|image_pad|> has id", _swap_placeholders, _TOKENIZER, also=("image_token_id",)),
        Bad("patch_size is 8, the vision tower's 16", sets("vision_config", patch_size=16)),
        Bad("merge_size is 2, the vision tower's 4", sets("vision_config", spatial_merge_size=4)),
        Bad("temporal_patch_size is 2, the vision tower's 1", sets("vision_config", temporal_patch_size=1)),
        Bad("spatial_merge_size = 0", sets("vision_config", spatial_merge_size=0)),
        Bad("patch_size = -8", sets("vision_config", patch_size=-8)),
        Bad("hidden_size 48, but the text model's is 64", sets("vision_config", hidden_size=48)),
        Bad("embed_dim 48 does not make num_heads 8 heads", sets("vision_config", num_heads=8)),
        Bad("num_heads = 0", sets("vision_config", num_heads=0)),
        Bad("hidden_act = 'gelu_new'", sets("vision_config", hidden_act="gelu_new")),
        Bad("in_channels = 4", sets("vision_config", in_channels=4)),
        Bad("linear", sets("vision_config", **_rope("linear", factor=2.0))),
        Bad("factor", sets("vision_config", **_rope("axial", factor=2.0))),
        Bad("hidden_act = 'gelu'", sets("text_config", hidden_act="gelu")),
        Bad("vocab_size is 260", sets("text_config", vocab_size=260)),
        Bad("mrope_section", sets("text_config", **_rope("default", mrope_section=[2, 2, 3]))),
        Bad("mrope_section", sets("text_config", **_rope("default"))),
        Bad("patch_size is 16, the vision tower's 8", sets("image_processor", patch_size=16), _PROCESSOR),
        Bad("merge_size is 1, the vision tower's 2", sets("image_processor", merge_size=1), _PROCESSOR),
        Bad(
            "temporal_patch_size is 4, the vision tower's 2", sets("image_processor", temporal_patch_size=4), _PROCESSOR
        ),
        Bad(
            "at least 5000 pixels of an image and at most 4999",
            sets("image_processor", size={"shortest_edge": 5000, "longest_edge": 4999}),
            _PROCESSOR,
        ),
        Bad(
            "at least 20000 pixels of an image and at most 19999",
            sets("image_processor", min_pixels=20_000, max_pixels=19_999),
            _PROCESSOR,
        ),
        Bad("'shortest_edge': 0", sets("image_processor", min_pixels=0), _PROCESSOR),
        Bad("many", sets("image_processor", max_pixels="many"), _PROCESSOR),
        Bad("'height': 64", sets("image_processor", size={"height": 64, "width": 64}), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_convert_rgb", sets("image_processor", do_convert_rgb=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("do_normalize", sets("image_processor", do_normalize=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_mean", sets("image_processor", image_mean=[0.5, 0.5]), _PROCESSOR),
        Bad("image_mean", sets("image_processor", image_mean=["a", 0.5, 0.5]), _PROCESSOR),
        Bad("image_std = [0.5, 0.0, 0.5]", sets("image_processor", image_std=[0.5, 0.0, 0.5]), _PROCESSOR),
        Bad("CLIPImageProcessor", sets("image_processor", image_processor_type="CLIPImageProcessor"), _PROCESSOR),
        Bad("preprocessor_config.json", lambda c: c["image_processor"].clear(), _PROCESSOR),
        Bad(
            _PATCHES,
            lambda weights: weights.update({_PATCHES: weights[_PATCHES][:, :, :1].copy()}),
            _WEIGHTS,
            "WeightsError",
            also=("[48, 3, 1, 8, 8]", "[48, 3, 2, 8, 8]"),
        ),
    ),
    needed=(
        Tensor("model.embed_tokens.weight"),
        Tensor("model.layers.1.self_attn.k_proj.bias"),
        Tensor("visual.blocks.1.attn.qkv.bias"),
        Tensor("visual.merger.ln_q.weight"),
        Tensor(_PATCHES),
    ),
    unneeded=(
        Tensor("visual.blocks.2.norm1.weight"),
        Tensor("visual.patch_embed.proj.bias"),
        Tensor("model.layers.9.x"),
    ),
)
