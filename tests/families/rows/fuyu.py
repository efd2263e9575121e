"""Fuyu."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_fuyu import save_tiny_fuyu

CONFIGS: dict[str, dict[str, Any]] = {
    "patches": {},
    "old_files_larger_images": {"names": "hub", "image_settings": {"size": {"height": 96, "width": 64}}},
    "tied_plain_heads_sharded": {
        "config": {"tie_word_embeddings": True},
        "text": {"qk_layernorm": False, "tie_word_embeddings": True},
        "shard_size": "200KB",
        "seed": 3,
    },
    "state_dict_names_other_values": {
        "names": "state_dict",
        "config": {"patch_size": 4},
        "image_settings": {
            "size": {"height": 32, "width": 48},
            "resample": 3,
            "padding_value": 99,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": 0.25,
        },
        "template": (
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '|SPEAKER|' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
        ),
    },
}
CASES = {
    **{case: asked for case, asked in PROMPTS.items() if len(asked[1]) < 2},
    "strip": ("Read.", [(9, 350)]),
    "large": ("Describe\nthe picture.", [(401, 517)]),
    "high": ("Describe.", [(97, 41)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "fuyu",
    save_tiny_fuyu,
    CONFIGS,
    CASES,
    compared=("patches",),
    probed=("patches",),
    spared={"segments": "tests/decoders/test_split.py cuts the decoder; prompts of text are as short as a step here"},
    layouts=("patches", "old_files_larger_images"),
    bad=(
        Bad("num_channels = 1", sets(num_channels=1)),
        Bad("patch_size is {'height': 8, 'width': 8}, the model's 16", sets(patch_size=16)),
        Bad("hidden_act = 'gelu'", sets("text_config", hidden_act="gelu")),
        Bad("hidden_size 128 is no multiple of num_attention_heads 5", sets("text_config", num_attention_heads=5)),
        Bad("60×96 px", sets("image_processor", size={"height": 60, "width": 96}), _PROCESSOR),
        Bad("'reflect'", sets("image_processor", padding_mode="reflect"), _PROCESSOR),
        Bad("padding_value 0.5", sets("image_processor", padding_value=0.5), _PROCESSOR),
        Bad("do_pad", sets("image_processor", do_pad=False), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("dense_h_to_4h", sets("text_config", intermediate_size=64), error="WeightsError"),
    ),
    needed=(
        Tensor("vision_embed_tokens.bias"),
        Tensor("language_model.model.layers.1.self_attn.query_key_value.weight"),
        Tensor("language_model.model.layers.1.self_attn.q_layernorm.bias"),
    ),
    unneeded=(
        Tensor("vision_embed_tokens.norm.weight"),
        Tensor("language_model.model.layers.7.mlp.dense_h_to_4h.weight"),
    ),
    placeholder="|SPEAKER|",
    tokens=("|NEWLINE|", "<s>", "<0x04>"),
)
