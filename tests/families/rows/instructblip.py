"""InstructBLIP with Llama and with Flan-T5."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_blip import save_tiny_instructblip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "every_layer_crosses_sharded": {
        "vision": {"qkv_bias": False},
        "qformer": {"cross_attention_frequency": 1, "num_hidden_layers": 2},
        "shard_size": "200KB",
        "seed": 3,
    },
    "one_query_one_layer": {
        "config": {"num_query_tokens": 1},
        "qformer": {"num_hidden_layers": 1, "hidden_act": "relu"},
        "vision": {"image_size": 54},
    },
    "blank_at_the_beginning_alone": {"prepends": "first"},
    "published_files_tied": {
        "names": "hub",
        "text": {"tie_word_embeddings": True},
        "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6]},
    },
    "t5": {"text": {"model_type": "t5", "tie_word_embeddings": False}},
    "state_dict_names": {"names": "state_dict"},
}
CASES = {
    **PROMPTS,
    "no_text": ("", [(64, 64)]),
    "long_text": ("What is the colour of the picture? " * 4, [(401, 517)]),
    "three_images": ("Compare.", [(5, 9), (50, 50), (200, 100)]),
}
_PROCESSOR = "processor_config.json"
_WORDS = "qformer_tokenizer/tokenizer.json"

ROW = Row(
    "instructblip",
    save_tiny_instructblip,
    CONFIGS,
    CASES,
    compared=("llama", "t5"),
    probed=("llama",),
    spared={
        "calibration": "tower and Q-Former as BLIP-2's, the decoder is one of llava's",
        "eight_bits": "tower and Q-Former as BLIP-2's, the decoder is one of llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    bad=(
        Bad("text_config.model_type = 'gpt2'", sets("text_config", model_type="gpt2")),
        Bad("no image_token_index", lambda c: c.pop("image_token_index")),
        Bad("cross_attention_frequency = 0", sets("qformer_config", cross_attention_frequency=0)),
        Bad("vocab_size is 60", sets("qformer_config", vocab_size=60)),
        Bad("'gelu_new'", sets("qformer_config", hidden_act="gelu_new")),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("num_query_tokens = 32", sets(num_query_tokens=32), _PROCESSOR),
        Bad("chat template", sets(chat_template="{{ messages }}"), _PROCESSOR),
        Bad("qformer_tokenizer/tokenizer.json", None, _WORDS, "SourceError"),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
        Bad("position_embeddings", sets("qformer_config", max_position_embeddings=90), error="WeightsError"),
    ),
    needed=(
        Tensor("query_tokens"),
        Tensor("qformer.embeddings.word_embeddings.weight"),
        Tensor("qformer.encoder.layer.1.intermediate.dense.weight"),
        Tensor("language_projection.bias"),
        Tensor("language_model.lm_head.weight"),
    ),
    unneeded=(
        Tensor("qformer.encoder.layer.1.crossattention.attention.query.weight"),
        Tensor("qformer.layernorm.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
)
