"""InternVL in both layouts."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_internvl import save_tiny_internvl, save_tiny_internvl_chat

ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
QK_NORM = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}

# transformers' layout.
SAVED: dict[str, dict[str, Any]] = {
    "qwen2_untied": {},
    "qwen2_tied": {"config": {"tie_word_embeddings": True}},
    "llama_no_template": {"text": {"model_type": "llama", "num_key_value_heads": 4}, "template": None},
    "qwen3": {"text": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}},
    "state_dict_names": {"names": "state_dict", "images": {"min_patches": 2, "max_patches": 3}},
    "rms_norm_qk_norm": {"vision": QK_NORM, "images": {"crop_to_patches": True}},
    "one_tile": {"images": {"max_patches": 1, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}},
    "inner_layer": {"config": {"vision_feature_layer": -2}},
    "last_layer_before_the_norm": {"config": {"vision_feature_layer": 3}, "vision": {"use_mean_pooling": False}},
    "last_norm_mask_token": {"vision": {"use_mean_pooling": False, "use_mask_token": True}},
    "quarter_relu": {
        "config": {"downsample_ratio": 0.25, "projector_hidden_act": "relu"},
        "vision": {"image_size": 48},
    },
    "sharded_many_tiles": {"shard_size": "300KB", "seed": 3, "images": {"max_patches": 12}},
}
# The original layout.
CHAT: dict[str, dict[str, Any]] = {
    "chat_qwen2": {},
    "chat_qwen2_tied": {"config": {"tie_word_embeddings": True}, "top": {"use_thumbnail": False}},
    "chat_llama": {"text": {"model_type": "llama"}, "top": {"min_dynamic_patch": 2, "max_dynamic_patch": 4}},
    "chat_qwen3": {"text": {"model_type": "qwen3"}, "top": {"force_image_size": None}},
    "chat_internlm2": {"internlm2": True, "text": {"num_key_value_heads": 1}},
    "chat_internlm2_dynamic_sharded": {"internlm2": True, "text": {"rope_parameters": ROPE}, "shards": 2, "seed": 1},
    "chat_internlm2_multi_head_tied": {
        "internlm2": True,
        "text": {"num_key_value_heads": 4},
        "config": {"tie_word_embeddings": True},
    },
    "chat_internlm2_qk_norm": {"internlm2": True, "vision": QK_NORM, "top": {"max_dynamic_patch": 1}},
    "chat_static": {"top": {"dynamic_image_size": False}, "vision": {"norm_type": "rms_norm"}},
    "chat_inner_layer": {"config": {"vision_feature_layer": -2}, "vision": {"attention_bias": False}},
}
CONFIGS = {**SAVED, **{name: {"chat": True, **config} for name, config in CHAT.items()}}
CASES = {
    **PROMPTS,
    "tall": ("What does it say?", [(301, 60)]),
    "strips": ("Read.", [(2, 400), (350, 3)]),
    "unequal_images": ("Compare.", [(40, 40), (20, 95), (9, 10), (160, 97)]),
}


_CHAT, _IMAGES, _PROCESSOR = "chat_internlm2", "preprocessor_config.json", "processor_config.json"


def save(folder: Path, *, chat: bool = False, **config: Any) -> Any:
    """In transformers' layout, or the original one."""
    return (save_tiny_internvl_chat if chat else save_tiny_internvl)(folder, **config)


def _misshapen(word: str, change: Any) -> Bad:
    return Bad(word, change, error="WeightsError", config=_CHAT)


def _original(word: str, change: Any) -> Bad:
    return Bad(word, change, config=_CHAT)


SAVED_WRONG = (
    Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
    Bad("-4, but the tower has 3 layers", sets(vision_feature_layer=-4)),
    Bad("is 0", sets(vision_feature_layer=0)),
    Bad("[-1]", sets(vision_feature_layer=[-1])),
    Bad("vision_feature_select_strategy", sets(vision_feature_select_strategy="full")),
    Bad("downsample_ratio = 0.3", sets(downsample_ratio=0.3)),
    Bad("downsample_ratio = 0.0", sets(downsample_ratio=0.0)),
    Bad("8 patches", sets(downsample_ratio=0.0625)),
    Bad("image_token_id = 3", sets(image_token_id=3)),
    Bad("text_config.model_type = 'gpt_neox'", sets("text_config", model_type="gpt_neox")),
    Bad("vocab_size is 280", sets("text_config", vocab_size=280)),
    Bad("hidden_act = 'gelu_new'", sets("vision_config", hidden_act="gelu_new")),
    Bad("norm_type = 'batch_norm'", sets("vision_config", norm_type="batch_norm")),
    Bad("image_size = [32, 64]", sets("vision_config", image_size=[32, 64])),
    Bad("patch_size = [4]", sets("vision_config", patch_size=[4])),
    Bad("num_channels = 1", sets("vision_config", num_channels=1)),
    Bad("num_attention_heads 3", sets("vision_config", num_attention_heads=3)),
    Bad("patch_size 5", sets("vision_config", patch_size=5)),
    Bad("use_absolute_position", sets("vision_config", use_absolute_position_embeddings=False)),
    Bad("64×64 px", sets(size={"height": 64, "width": 64}), _IMAGES),
    Bad("32×64 px", sets(size={"height": 32, "width": 64}), _IMAGES),
    Bad("at least 4 and at most 3", sets(min_patches=4, max_patches=3), _IMAGES),
    Bad("at least 0", sets(min_patches=0), _IMAGES),
    Bad("do_resize", sets(do_resize=False), _IMAGES),
    Bad("do_rescale", sets(do_rescale=False), _IMAGES),
    Bad("do_convert_rgb", sets(do_convert_rgb=False), _IMAGES),
    Bad("resample", sets(resample=9), _IMAGES),
    Bad("CLIPImageProc", sets(image_processor_type="CLIPImageProcessor"), _IMAGES),
    Bad("image_seq_length = 256", sets(image_seq_length=256), _PROCESSOR),
    Bad("image_seq_length = 256 (256 if", lambda c: c.pop("image_seq_length"), _PROCESSOR),
    Bad("preprocessor_config.json", None, _IMAGES),
)
CHAT_WRONG = (
    _original("ps_version = 'v1'", sets(ps_version="v1")),
    _original("ps_version = 'v1'", lambda c: c.pop("ps_version")),
    _original("ps_version = 'v3'", sets(ps_version="v3")),
    _original("pad2square = True", sets(pad2square=True)),
    _original("use_llm_lora = 16", sets(use_llm_lora=16)),
    _original("force_image_size = 64", sets(force_image_size=64)),
    _original("at least 7 and at most 6", sets(min_dynamic_patch=7)),
    _original("-4, but the tower has 3 layers", sets(select_layer=-4)),
    _original("no chat template", sets(template="phi3-chat")),
    _original("no llm_config", lambda c: c.pop("llm_config")),
    _original("no vision_config", sets(vision_config=None)),
    _original("MambaForCausalLM", sets("llm_config", architectures=["MambaForCausalLM"])),
    _original("architectures", lambda c: c["llm_config"].pop("architectures")),
    _original("bias = True", sets("llm_config", bias=True)),
    _original("bias = True", lambda c: c["llm_config"].pop("bias")),
    _original("hidden_act = 'relu'", sets("llm_config", hidden_act="relu")),
    _original("xpos", sets("llm_config", rope_scaling={"type": "xpos", "factor": 2.0})),
    _original("layer_norm_eps = 1e-05", sets("vision_config", qk_normalization=True, layer_norm_eps=1e-5)),
    _original("norm_type = 'batch_norm'", sets("vision_config", norm_type="batch_norm")),
    Bad("tokenizer.json", None, "tokenizer.json", "SourceError", _CHAT),
    # transformers refuses it, in words of this project.
    Bad("config.json", sets("llm_config", num_attention_heads=5), error="MllmEdgeError", config=_CHAT),
    _misshapen("wqkv.weight", sets("llm_config", num_key_value_heads=4)),
    _misshapen("feed_forward.w1.weight", sets("llm_config", intermediate_size=256)),
    _misshapen("vision_model.", sets("vision_config", hidden_size=32)),
    _misshapen("attention.q_norm.weight", sets("vision_config", qk_normalization=True)),
    _misshapen("vision_model.embeddings.position_embedding", sets("vision_config", patch_size=8)),
    _misshapen("mlp.fc1", sets("vision_config", intermediate_size=256)),
    # InternLM2's head, and one under Llama's name.
    Bad(
        "language_model.output.weight",
        sets(**{"language_model.lm_head.weight": np.zeros((1, 64), np.float32)}),
        "model.safetensors",
        "WeightsError",
        _CHAT,
        ("language_model.lm_head.weight", "are both"),
    ),
)

ROW = Row(
    "internvl",
    save,
    CONFIGS,
    CASES,
    compared=("qwen2_untied", "rms_norm_qk_norm", "chat_internlm2", "chat_qwen2_tied"),
    probed=("qwen3", "chat_internlm2", "chat_qwen2"),
    layouts=("qwen2_untied", _CHAT),
    targets=("qwen2_untied", "chat_internlm2_qk_norm"),
    spared={
        "calibration": "tiles and decoders as those of idefics3 and llava",
        "segments": "decoders as those of llava and qwen2_vl",
        "speculation": "decoders as those of llava and qwen2_vl",
    },
    placeholder="<IMG_CONTEXT>",
    tokens=("<img>", "</img>"),
    bad=(*SAVED_WRONG, *CHAT_WRONG),
    needed=(
        Tensor("language_model.model.embed_tokens.weight", told="model.language_model.embed_tokens.weight"),
        Tensor("vision_tower.embeddings.cls_token"),
        Tensor("vision_tower.encoder.layer.1.lambda_2"),
        Tensor("multi_modal_projector.layer_norm.bias"),
        Tensor("language_model.lm_head.weight", told="lm_head.weight"),
        Tensor("vision_model.embeddings.position_embedding", _CHAT, "vision_tower.embeddings.position_embeddings"),
        Tensor("vision_model.encoder.layers.2.attn.qkv.weight", _CHAT),
        Tensor("vision_model.encoder.layers.0.attn.qkv.bias", _CHAT),
        Tensor("mlp1.1.weight", _CHAT, "multi_modal_projector.linear_1.weight"),
        Tensor("language_model.model.layers.1.attention.wqkv.weight", _CHAT),
        Tensor("language_model.output.weight", _CHAT, "lm_head.weight"),
    ),
    unneeded=(
        Tensor("vision_tower.encoder.layer.7.lambda_2"),
        Tensor("vision_tower.head.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
        Tensor("vision_model.encoder.layers.1.attn.q_norm.weight", _CHAT),
        Tensor("mlp1.4.weight", _CHAT),
    ),
)
