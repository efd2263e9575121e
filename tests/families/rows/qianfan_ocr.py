"""Qianfan-OCR."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_internvl import save_tiny_qianfan_ocr

CONFIGS: dict[str, dict[str, Any]] = {
    "state_dict_names": {"names": "state_dict"},
    "original_names": {},
    "rms_norm_qk_norm_no_template": {
        "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
        "template": None,
    },
    "last_layer_by_number": {"config": {"vision_feature_layer": 3}, "vision": {"use_mean_pooling": False}},
    "inner_layer_tied_sharded": {
        "config": {"vision_feature_layer": -2, "tie_word_embeddings": True},
        "images": {"max_patches": 12},
        "shard_size": "300KB",
        "seed": 3,
    },
    "one_tile": {"images": {"max_patches": 1, "resample": 2}},
}
CASES = {**PROMPTS, "tall": ("What does it say?", [(301, 60)]), "strips": ("Read.", [(2, 400), (350, 3)])}
_IMAGES, _PROCESSOR, _OLD = "preprocessor_config.json", "processor_config.json", "original_names"

ROW = Row(
    "qianfan_ocr",
    save_tiny_qianfan_ocr,
    CONFIGS,
    CASES,
    compared=("state_dict_names",),
    probed=("original_names",),
    spared={
        "calibration": "tiles as those of internvl",
        "eight_bits": "tiles as those of internvl",
        "int8_cache": "one of internvl's decoders",
        "segments": "decoders as those of llava and qwen2_vl",
        "speculation": "decoders as those of llava and qwen2_vl",
    },
    placeholder="<IMG_CONTEXT>",
    tokens=("<img>", "</img>"),
    bad=(
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("-5, but the tower has 3 layers", sets(vision_feature_layer=-5)),
        Bad("downsample_ratio = 0.3", sets(downsample_ratio=0.3)),
        Bad("text_config.model_type = 'gpt_neox'", sets("text_config", model_type="gpt_neox")),
        Bad("norm_type = 'batch_norm'", sets("vision_config", norm_type="batch_norm")),
        Bad("use_absolute_position", sets("vision_config", use_absolute_position_embeddings=False)),
        Bad("image_token_id = 3", sets(image_token_id=3)),
        Bad("64×64 px", sets(size={"height": 64, "width": 64}), _IMAGES),
        Bad("at least 4 and at most 3", sets(min_patches=4, max_patches=3), _IMAGES),
        Bad("do_rescale", sets(do_rescale=False), _IMAGES),
        Bad("image_seq_length = 256", sets(image_seq_length=256), _PROCESSOR),
        Bad("image_placeholder_token", sets(image_placeholder_token=""), _PROCESSOR),
        Bad("mlp.fc1", sets("vision_config", intermediate_size=256), error="WeightsError"),
    ),
    needed=(
        Tensor("model.vision_tower.layers.1.lambda_2"),
        Tensor("model.vision_tower.embeddings.cls_token"),
        Tensor("vision_model.embeddings.class_embedding", _OLD, "vision_tower.embeddings.cls_token"),
        Tensor("vision_model.encoder.layers.1.attn.qkv.bias", _OLD),
        Tensor("mlp1.1.weight", _OLD, "multi_modal_projector.linear_1.weight"),
    ),
    unneeded=(
        Tensor("model.vision_tower.layers.7.lambda_2"),
        Tensor("vision_model.encoder.layers.7.ls2", _OLD),
        Tensor("mlp1.4.weight", _OLD),
    ),
)
