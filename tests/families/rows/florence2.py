"""Florence-2."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_florence2 import save_tiny_florence2

CONFIGS: dict[str, dict[str, Any]] = {
    "bart": {},
    "unequal_sides_sharded": {
        "text": {
            "encoder_layers": 1,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_ffn_dim": 80,
            "activation_function": "relu",
        },
        "shard_size": "100KB",
        "seed": 3,
    },
    "all_names_scaled_embeddings": {"names": "state_dict", "text": {"scale_embedding": True}},
    "crop_own_head": {
        "config": {"tie_word_embeddings": False},
        "vision": {"patch_prenorm": [True, False, True], "qkv_bias": False, "depths": [1, 2, 1], "window_size": 5},
        "image_settings": {
            "size": {"shortest_edge": 70},
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
            "image_seq_length": 17,
        },
        "generation": {"forced_bos_token_id": None},
    },
}
CASES = {
    **PROMPTS,
    "task": ("<CAPTION>", [(40, 60)]),
    "task_about": ("<CAPTION_TO_PHRASE_GROUNDING> a red car <loc_1>", [(97, 51)]),
    "strip": ("Read.", [(3, 350)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR, _TEXT = "processor_config.json", "model.language_model"

ROW = Row(
    "florence2",
    save_tiny_florence2,
    CONFIGS,
    CASES,
    compared=("bart",),
    probed=("bart",),
    spared={
        "calibration": "shown in test_florence2",
        "int8_cache": "layers of self-attention as llava's",
        "segments": "the decoder's pieces are shown in tests/decoders",
    },
    bad=(
        Bad("text_config.model_type = 't5'", sets("text_config", model_type="t5")),
        Bad("activation_function = 'swish'", sets("text_config", activation_function="swish")),
        Bad("tie_word_embeddings = False", sets("text_config", tie_word_embeddings=False)),
        Bad("projection_dim = 32", sets("vision_config", projection_dim=32)),
        Bad("in_channels = 4", sets("vision_config", in_channels=4)),
        Bad("window_size = 0", sets("vision_config", window_size=0)),
        Bad("depths [1, 1]", sets("vision_config", depths=[1, 1])),
        Bad("5 num_groups", sets("vision_config", num_groups=[2, 5, 6])),
        Bad("of 2 max_position_embeddings", sets("vision_config", max_position_embeddings=2)),
        Bad("activation_function = 'swish'", sets("vision_config", activation_function="swish")),
        Bad("48×64 px", sets("image_processor", size={"height": 48, "width": 64}), _PROCESSOR),
        Bad("any size", sets("image_processor", size={"shortest_edge": 48}), _PROCESSOR),
        Bad("image_seq_length = 10", sets("image_processor", size={"height": 64, "width": 64}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("ffn.fc1", sets("vision_config", mlp_ratio=2.0), error="WeightsError"),
        Bad("fc1", sets("text_config", decoder_ffn_dim=80), error="WeightsError"),
    ),
    needed=(
        Tensor(f"{_TEXT}.shared.weight"),
        Tensor(f"{_TEXT}.encoder.embed_positions.weight"),
        Tensor(f"{_TEXT}.encoder.layers.1.fc2.bias"),
        Tensor(f"{_TEXT}.decoder.layers.0.encoder_attn.k_proj.weight"),
        Tensor("model.multi_modal_projector.image_position_embed.row_embeddings.weight"),
        Tensor("model.vision_tower.blocks.2.0.channel_block.conv2.bias"),
    ),
    unneeded=(
        Tensor(f"{_TEXT}.encoder.layers.7.fc1.weight"),
        Tensor(f"{_TEXT}.decoder.layers.7.encoder_attn.q_proj.weight"),
        Tensor("model.vision_tower.blocks.3.0.channel_block.conv2.bias"),
        Tensor("model.multi_modal_projector.image_projection.bias"),
    ),
)
