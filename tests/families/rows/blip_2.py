"""BLIP-2 with OPT and with Flan-T5."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_blip import save_tiny_blip_2

CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {},
    "no_bias_every_layer_crosses_sharded": {
        "text": {"activation_function": "gelu"},
        "vision": {"qkv_bias": False, "hidden_act": "quick_gelu"},
        "qformer": {"cross_attention_frequency": 1, "num_hidden_layers": 2},
        "shard_size": "200KB",
        "seed": 3,
    },
    "one_query_one_layer": {
        "config": {"num_query_tokens": 1},
        "qformer": {"num_hidden_layers": 1},
        "vision": {"image_size": 54},
    },
    "published_files": {"names": "hub", "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
    "t5": {"text": {"model_type": "t5", "tie_word_embeddings": False, "dense_act_fn": "gelu"}},
    "t5_all_names_scaled_logits": {"names": "state_dict", "text": {"model_type": "t5", "feed_forward_proj": "relu"}},
    "state_dict_names_untied": {"names": "state_dict", "text": {"tie_word_embeddings": False}},
}
CASES = {
    **PROMPTS,
    "caption": ("", [(64, 64)]),
    "pixel": ("a photo of", [(1, 1)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"
_OPT350 = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}

ROW = Row(
    "blip_2",
    save_tiny_blip_2,
    CONFIGS,
    CASES,
    compared=("opt", "t5"),
    probed=("opt", "t5"),
    spared={
        "calibration": "its layers are those of other towers and decoders, in another order",
        "int8_cache": "keys that no rope turns share no scales",
        "segments": "its layers are those of other decoders, in another order",
        "speculation": "positions of their own change nothing in a step that checks guesses",
    },
    bad=(
        Bad("text_config.model_type = 'gpt2'", sets("text_config", model_type="gpt2")),
        Bad("dense_act_fn = 'tanh'", sets("text_config", dense_act_fn="tanh"), config="t5"),
        Bad("decoder_start_token_id = '2'", sets(decoder_start_token_id="2"), "generation_config.json", config="t5"),
        Bad("DenseReluDense.wi_0", sets("text_config", d_ff=80), config="t5", error="WeightsError"),
        Bad("enable_bias = False", sets("text_config", enable_bias=False)),
        Bad("do_layer_norm_before = False", sets("text_config", **_OPT350)),
        Bad("no image_token_index", lambda c: c.pop("image_token_index")),
        Bad("use_qformer_text_input = True", sets("qformer_config", use_qformer_text_input=True)),
        Bad("qformer_config: hidden_size 48 does not make", sets("qformer_config", num_attention_heads=5)),
        Bad("cross_attention_frequency = 0", sets("qformer_config", cross_attention_frequency=0)),
        Bad("num_query_tokens = 0", sets(num_query_tokens=0)),
        Bad("'gelu_new'", sets("qformer_config", hidden_act="gelu_new")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("num_query_tokens = 32", sets(num_query_tokens=32), _PROCESSOR),
        Bad("chat template", sets(chat_template="{{ messages }}"), _PROCESSOR),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
        Bad("query_tokens", sets(num_query_tokens=6), error="ConfigError"),
    ),
    needed=(
        Tensor("query_tokens"),
        Tensor("qformer.layernorm.weight"),
        Tensor("qformer.encoder.layer.2.crossattention.output.LayerNorm.bias"),
        Tensor("language_projection.bias"),
        Tensor("vision_model.encoder.layers.1.self_attn.qkv.bias"),
        Tensor("language_model.model.decoder.final_layer_norm.weight"),
        Tensor("language_model.decoder.block.1.layer.1.EncDecAttention.v.weight", "t5"),
        Tensor("language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "t5"),
    ),
    unneeded=(
        Tensor("qformer.encoder.layer.1.crossattention.attention.query.weight"),
        Tensor("qformer.encoder.layer.0.intermediate.dense.weight"),
        Tensor("vision_model.encoder.layers.7.mlp.fc1.weight"),
        Tensor("language_model.model.decoder.layers.7.fc1.weight"),
        Tensor("language_model.encoder.block.7.layer.0.layer_norm.weight", "t5"),
    ),
)
