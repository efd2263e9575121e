"""Granite-Docling."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_granite_docling import save_tiny_granite_docling

CONFIGS: dict[str, dict[str, Any]] = {
    "two_taps_and_a_fine_path": {},
    "no_taps_router_no_template": {
        "vision": {"deepstack_visual_indexes": []},
        "config": {"density_router_hidden_size": 8},
        "template": None,
    },
    "coarse_path_alone_tied_sharded": {
        "vision": {"use_fine_route": False, "scale_factor": 2, "deepstack_visual_indexes": [1], "hidden_act": "gelu"},
        "text": {"attention_bias": True, "mlp_bias": True},
        "config": {"tie_word_embeddings": True},
        "image_settings": {"max_patches": 3, "resample": 2},
        "shard_size": "300KB",
        "seed": 3,
    },
    "one_tile": {"image_settings": {"crop_to_patches": False}},
    "state_dict_names": {"names": "state_dict"},
}
CASES = {**PROMPTS, "tall": ("What does it say?", [(301, 60)]), "strips": ("Read.", [(2, 400), (350, 3)])}
_PROCESSOR, _VISION = "processor_config.json", "model.vision_model."

ROW = Row(
    "granite_docling",
    save_tiny_granite_docling,
    CONFIGS,
    CASES,
    compared=("two_taps_and_a_fine_path",),
    probed=("two_taps_and_a_fine_path",),
    spared={"segments": "a decoder as llava's, features of layers as qwen3_vl's"},
    bad=(
        Bad("deepstack_visual_indexes = [2, 0]", sets("vision_config", deepstack_visual_indexes=[2, 0])),
        Bad("deepstack_visual_indexes = [3]", sets("vision_config", deepstack_visual_indexes=[3])),
        Bad("[0, 1, 2], but the text model has 2", sets("vision_config", deepstack_visual_indexes=[0, 1, 2])),
        Bad("scale_factor 3", sets("vision_config", scale_factor=3)),
        Bad("out_hidden_size (48)", sets("vision_config", out_hidden_size=48)),
        Bad("hidden_act = 'gelu_new'", sets("vision_config", hidden_act="gelu_new")),
        Bad("'relu'", sets("text_config", hidden_act="relu")),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("64×64 px", sets("image_processor", size={"height": 64, "width": 64}), _PROCESSOR),
        Bad("image_seq_len = 99", sets(image_seq_len=99), _PROCESSOR),
        Bad("fine_route is True", sets("image_processor", fine_route=True), _PROCESSOR),
        Bad("dense_max_patches is 9", sets("image_processor", dense_max_patches=9), _PROCESSOR),
        Bad("at least 9 and at most 6", sets("image_processor", min_patches=9), _PROCESSOR),
        Bad("do_normalize", sets("image_processor", do_normalize=False), _PROCESSOR),
        Bad("gate_proj", sets("text_config", intermediate_size=256), error="WeightsError"),
    ),
    needed=(
        Tensor(f"{_VISION}connector.coarse.deepstack_mergers.1.linear_2.bias"),
        Tensor(f"{_VISION}connector.ln_out.weight"),
        Tensor(f"{_VISION}embeddings.position_embedding.weight"),
        Tensor("model.text_model.layers.1.self_attn.o_proj.weight"),
    ),
    unneeded=(
        Tensor(f"{_VISION}connector.coarse.deepstack_mergers.2.linear_2.bias"),
        Tensor(f"{_VISION}head.probe"),
        Tensor("model.text_model.layers.7.mlp.up_proj.weight"),
    ),
)
