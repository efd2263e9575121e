"""Emu3."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_emu3 import save_tiny_emu3

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "attention_in_the_middle": {},
    "heads_attention_inside_sharded": {
        "vision": {"attn_resolutions": [2, 3], "num_attention_heads": 2, "num_res_blocks": 2},
        "text": {"attention_bias": True},
        "template": _TEMPLATE,
        "shard_size": "200KB",
        "seed": 3,
    },
    "state_dict_names_other_values": {
        "names": "state_dict",
        "config": {"tie_word_embeddings": True},
        "vision": {"channel_multiplier": [2, 1, 1, 2], "latent_channels": 6, "embed_dim": 5, "attn_resolutions": []},
        "image_settings": {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "max_pixels": 40**2},
        "seed": 1,
    },
}
CASES = {
    **PROMPTS,
    # transformers' image processor takes one or three rows of pixels for channels.
    "strip": ("Read.", [(4, 350)]),
    "large": ("Describe.", [(401, 517)]),
    "pixels": ("What?", [(2, 2)]),
    "three_images": ("Which?", [(40, 40), (30, 88), (88, 30)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "emu3",
    save_tiny_emu3,
    CONFIGS,
    CASES,
    compared=("attention_in_the_middle",),
    probed=("attention_in_the_middle",),
    refused={"cuda": "InstanceNormalization"},
    spared={
        "calibration": "a tower of convolutions, which stay as they are, but for attention; a decoder as llava's",
        "int8_cache": "one of llava's decoders",
        "segments": "one of llava's decoders",
        "speculation": "one of llava's decoders",
    },
    bad=(
        Bad("double_latent = True", sets("vq_config", double_latent=True)),
        Bad("temporal_downsample_factor = 2", sets("vq_config", temporal_downsample_factor=2)),
        Bad("in_channels = 4", sets("vq_config", in_channels=4)),
        Bad("base_channels 24", sets("vq_config", base_channels=24)),
        Bad("hidden_size 32 where attention stands", sets("vq_config", hidden_size=32)),
        Bad("at attn_resolutions [0]", sets("vq_config", attn_resolutions=[0])),
        Bad("num_attention_heads 5", sets("vq_config", num_attention_heads=5)),
        Bad("a code of 4 px", sets("vq_config", channel_multiplier=[1, 2, 2])),
        Bad("names 16 words of images, and there are 17 codes", sets("vq_config", codebook_size=17)),
        Bad("hidden_act = 'gelu'", sets("text_config", hidden_act="gelu")),
        Bad("multiples of 16 px", sets("image_processor", spatial_factor=16), _PROCESSOR),
        Bad("images of 9000 to 4096 px", sets("image_processor", min_pixels=9000), _PROCESSOR),
        Bad("do_resize", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("conv_in", sets("vq_config", base_channels=64, hidden_size=128), error="WeightsError"),
        Bad("quantize.embedding", sets("vq_config", embed_dim=5), error="WeightsError"),
    ),
    needed=(
        Tensor("vqmodel.quantize.embedding.weight"),
        Tensor("vqmodel.encoder.middle_block.attn_1.q_proj.weight"),
        Tensor("vqmodel.encoder.time_conv.1.conv.conv.weight"),
        Tensor("vqmodel.encoder.time_res_stack.0.norm2.running_var"),
        Tensor("text_model.model.layers.1.self_attn.k_proj.weight"),
    ),
    unneeded=(
        Tensor("vqmodel.encoder.middle_block.block_3.conv1.weight"),
        Tensor("text_model.model.layers.7.mlp.up_proj.weight"),
    ),
    tokens=("<|image start|>", "<|image end|>", "<|image token|>", "<|extra_201|>"),
)
