"""Qwen3-VL."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_qwen3 import save_tiny_qwen3_vl

CONFIGS: dict[str, dict[str, Any]] = {
    "two_taps": {},
    "no_taps_tied": {
        "vision": {"deepstack_visual_indexes": [], "depth": 1},
        "config": {"tie_word_embeddings": True},
        "template": None,
    },
    "three_taps_hub": {
        "names": "hub",
        "vision": {"deepstack_visual_indexes": [0, 1, 2]},  # the last layer, too
        "text": {"num_hidden_layers": 3, "num_key_value_heads": 4},
    },
    "biased_sharded": {
        "text": {
            "attention_bias": True,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        "vision": {"num_position_embeddings": 400},
        "shard_size": "200KB",
        "seed": 3,
    },
    "cells_of_one_patch": {
        "names": "state_dict",
        "image_settings": {"min_pixels": 1, "max_pixels": 30 * 8**2},
        "vision": {
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "num_position_embeddings": 1,
            "deepstack_visual_indexes": [1],
            "hidden_act": "gelu",
        },
    },
    # Gate and up together are as high as they are wide.
    "experts": {"model_type": "qwen3_vl_moe", "text": {"moe_intermediate_size": 32}},
    "some_experts_hub": {
        "model_type": "qwen3_vl_moe",
        "names": "hub",
        "text": {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "attention_bias": True,
        },
    },
}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strip": ("Read.", [(8, 400)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}
_PROCESSOR, _PATCHES = "processor_config.json", "model.visual.patch_embed.proj.weight"
_PLACES = "model.visual.pos_embed.weight"
_EXPERTS = "model.language_model.layers.0.mlp.experts.gate_up_proj"


def _of_other_shape(name: str, rows: int) -> Any:
    return lambda weights: weights.update({name: weights[name][:rows].copy()})


ROW = Row(
    "qwen3_vl",
    save_tiny_qwen3_vl,
    CONFIGS,
    CASES,
    compared=("two_taps", "experts"),
    probed=("three_taps_hub", "experts"),
    layouts=("two_taps", "experts"),
    spared={
        "calibration": "qwen2_vl's cells, internvl's Qwen3; what is added behind layers: test_qwen3_vl.py",
        "int8_cache": "what is added behind layers meets no cache",
    },
    targets=("two_taps", "experts"),
    placeholder="<|image_pad|>",
    tokens=("<|vision_start|>", "<|vision_end|>"),
    bad=(
        Bad("out_hidden_size 48", sets("vision_config", out_hidden_size=48)),
        Bad("deepstack_visual_indexes = [0, 3]", sets("vision_config", deepstack_visual_indexes=[0, 3])),
        Bad("deepstack_visual_indexes = [1, 0]", sets("vision_config", deepstack_visual_indexes=[1, 0])),
        Bad("deepstack_visual_indexes = [1, 1]", sets("vision_config", deepstack_visual_indexes=[1, 1])),
        Bad("deepstack_visual_indexes = [-1]", sets("vision_config", deepstack_visual_indexes=[-1])),
        Bad(
            "deepstack_visual_indexes = [0, 1, 2], but the text model has 2 layers",
            sets("vision_config", deepstack_visual_indexes=[0, 1, 2]),
        ),
        Bad("num_position_embeddings = 37", sets("vision_config", num_position_embeddings=37)),
        Bad("hidden_size 48 does not make num_heads 8 heads", sets("vision_config", num_heads=8)),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("in_channels = 4", sets("vision_config", in_channels=4)),
        Bad("linear", sets("vision_config", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})),
        Bad("patch_size is 8, the vision tower's 7", sets("vision_config", patch_size=7)),
        Bad("patch_size = [8, 8]", sets("vision_config", patch_size=[8, 8])),
        Bad(
            "mrope_interleaved = False",
            lambda config: config["text_config"]["rope_parameters"].update(mrope_interleaved=False),
        ),
        Bad(
            _EXPERTS,
            sets("text_config", num_local_experts=3),
            error="WeightsError",
            config="experts",
            also=("[4, 64, 64]", "[3, 64, 64]"),
        ),
        Bad("moe_intermediate_size = 0", sets("text_config", moe_intermediate_size=0), config="experts"),
        Bad("num_experts_per_tok 5 of 4 experts", sets("text_config", num_experts_per_tok=5), config="experts"),
        Bad("merge_size is 1", sets("image_processor", merge_size=1), _PROCESSOR),
        Bad("temporal_patch_size is 1", sets("image_processor", temporal_patch_size=1), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("Qwen2VLProcessor", sets(processor_class="Qwen2VLProcessor"), _PROCESSOR),
        Bad(_PLACES, _of_other_shape(_PLACES, 25), "model.safetensors", "WeightsError", also=("[25, 48]", "[36, 48]")),
        Bad(
            _PATCHES,
            _of_other_shape(_PATCHES, 24),
            "model.safetensors",
            "WeightsError",
            also=("[24, 3, 2, 8, 8]", "[48, 3, 2, 8, 8]"),
        ),
    ),
    needed=(
        Tensor("model.language_model.layers.1.self_attn.q_norm.weight"),
        Tensor("model.visual.blocks.1.mlp.linear_fc1.bias"),
        Tensor("model.visual.deepstack_merger_list.1.norm.weight"),
        Tensor("model.visual.merger.linear_fc2.weight"),
        Tensor("model.visual.patch_embed.proj.bias"),
        Tensor(_PLACES),
        Tensor("model.language_model.layers.1.mlp.experts.down_proj", "experts"),
        Tensor("model.language_model.layers.0.mlp.gate.weight", "some_experts_hub"),
    ),
    unneeded=(
        Tensor("model.visual.deepstack_merger_list.2.norm.weight"),
        Tensor("model.visual.blocks.3.norm1.weight"),
        Tensor("model.language_model.layers.1.self_attn.q_proj.bias"),
        Tensor("model.language_model.layers.1.mlp.up_proj.weight", "experts"),
        Tensor("model.language_model.layers.1.mlp.experts.down_proj", "some_experts_hub"),
    ),
)
