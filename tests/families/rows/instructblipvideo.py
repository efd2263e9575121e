"""InstructBLIP for video."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_blip import save_tiny_instructblipvideo

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "one_query_sharded": {
        "config": {"num_query_tokens": 1},
        "qformer": {"num_hidden_layers": 2, "cross_attention_frequency": 1},
        "shard_size": "200KB",
        "seed": 3,
    },
    "t5": {"text": {"model_type": "t5"}},
    "published_files": {"names": "hub", "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
}
CASES = {
    **PROMPTS,
    "no_text": ("", [(64, 64)]),
    "four_frames": ("What happens?", [(50, 70)] * 4),
}
_PROCESSOR = "processor_config.json"
_WORDS = "qformer_tokenizer/tokenizer.json"

ROW = Row(
    "instructblipvideo",
    save_tiny_instructblipvideo,
    CONFIGS,
    CASES,
    compared=("llama",),
    probed=("llama",),
    spared=dict.fromkeys(
        ("calibration", "eight_bits", "int8_cache", "segments", "speculation"), "the graphs are InstructBLIP's"
    ),
    placeholder="<video>",
    bad=(
        Bad("text_config.model_type = 'gpt2'", sets("text_config", model_type="gpt2")),
        Bad("video_token_index", lambda c: c.pop("video_token_index")),
        Bad("vocab_size is 60", sets("qformer_config", vocab_size=60)),
        Bad("image_token_id = 3", sets(video_token_index=3)),
        Bad("56×56 px", sets("video_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("do_rescale", sets("video_processor", do_rescale=False), _PROCESSOR),
        Bad("do_sample_frames", sets("video_processor", do_sample_frames=True), _PROCESSOR),
        Bad("video processor", sets("video_processor", video_processor_type="Other"), _PROCESSOR),
        Bad("no settings of a video processor", lambda c: c.pop("video_processor"), _PROCESSOR),
        Bad("num_query_tokens = 32", sets(num_query_tokens=32), _PROCESSOR),
        Bad("chat template", sets(chat_template="{{ messages }}"), _PROCESSOR),
        Bad("qformer_tokenizer/tokenizer.json", None, _WORDS, "SourceError"),
        Bad("position_embedding", sets("vision_config", patch_size=16), error="WeightsError"),
    ),
    needed=(Tensor("query_tokens"), Tensor("language_model.lm_head.weight")),
    unneeded=(Tensor("qformer.layernorm.weight"), Tensor("language_model.model.layers.7.mlp.up_proj.weight")),
)
