"""Chameleon."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_chameleon import save_tiny_chameleon

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "attention_in_the_middle": {},
    "swin_norms_attention_inside": {
        "config": {"swin_norm": True, "attention_bias": True, "tie_word_embeddings": True},
        "vision": {"attn_resolutions": [16], "num_res_blocks": 2},
        "template": _TEMPLATE,
    },
    "no_attention_sharded": {"vision": {"attn_type": "none"}, "shard_size": "200KB", "seed": 3},
    "state_dict_names_other_values": {
        "names": "state_dict",
        "vision": {"channel_multiplier": [2, 1]},
        "image_settings": {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255},
    },
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "chameleon",
    save_tiny_chameleon,
    CONFIGS,
    CASES,
    compared=("attention_in_the_middle",),
    probed=("attention_in_the_middle",),
    refused={"cuda": "InstanceNormalization"},
    spared={
        "calibration": "a tower of convolutions alone, which stay as they are; a decoder as llava's",
        "segments": "a decoder as llava's, with other norms",
    },
    bad=(
        Bad("attn_type = 'linear'", sets("vq_config", attn_type="linear")),
        Bad("double_latent = True", sets("vq_config", double_latent=True)),
        Bad("in_channels = 4", sets("vq_config", in_channels=4)),
        Bad("base_channels 24", sets("vq_config", base_channels=24)),
        Bad("names 16 words of images, and there are 17 codes", sets("vq_config", num_embeddings=17)),
        Bad("model_parallel_size = 2", sets(model_parallel_size=2)),
        Bad("40×40 px", sets("image_processor", crop_size={"height": 40, "width": 40}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_seq_length = 1024", sets(image_seq_length=1024), _PROCESSOR),
        Bad("conv_in", sets("vq_config", base_channels=64), error="WeightsError"),
    ),
    needed=(
        Tensor("model.vqmodel.quantize.embedding.weight"),
        Tensor("model.vqmodel.encoder.mid.attn_1.q.weight"),
        Tensor("model.layers.1.self_attn.q_norm.weight"),
    ),
    unneeded=(
        Tensor("model.vqmodel.encoder.mid.block_3.conv1.weight"),
        Tensor("model.layers.7.mlp.up_proj.weight"),
    ),
    tokens=("<racm3:break>", "<eoss>"),
)
