"""LLaVA 1.5 and its relatives."""

from typing import Any

from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny import save_tiny_llava

SIGLIP = {"model_type": "siglip_vision_model"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_multi_head_no_template": {"text": {"num_key_value_heads": 4}, "template": None},
    "mistral_window": {"text": {"model_type": "mistral", "sliding_window": 24}, "config": {"vision_feature_layer": 2}},
    "qwen2_tied": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}},
    "gemma3_window": {
        "text": {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "config": {"tie_word_embeddings": True},
    },
    "last_layer_full": {"config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}},
    "several_layers": {"config": {"vision_feature_layer": [-2, 1, -1], "multimodal_projector_bias": False}},
    "several_layers_full": {
        "config": {"vision_feature_layer": [0, 3], "vision_feature_select_strategy": "full"},
        "vision": {"hidden_act": "gelu"},
    },
    "embeddings_only": {"config": {"vision_feature_layer": [0], "projector_hidden_act": "relu"}},
    "siglip_full_qwen2": {
        "text": {"model_type": "qwen2"},
        "vision": {**SIGLIP, "image_size": 54},
        "config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "images": "siglip",
    },
    "siglip_drops_a_patch": {"vision": {**SIGLIP, "vision_use_head": False}, "images": "siglip"},
    "padded_to_square": {"images": "llava", "image_settings": {"do_pad": True}},
    "larger_before_the_crop": {"image_settings": {"size": {"shortest_edge": 57}, "resample": 2}},
    "cropped_beyond_the_image": {"image_settings": {"size": {"shortest_edge": 31}}},
    "sharded": {"shard_size": "200KB", "seed": 3},
    "state_dict_names": {"names": "state_dict"},
    "hub_names": {"names": "hub", "config": {"projector_hidden_act": "gelu_pytorch_tanh"}},
}

_PROCESSOR = "processor_config.json"


ROW = Row(
    "llava",
    save_tiny_llava,
    CONFIGS,
    compared=("siglip_full_qwen2",),
    probed=("mistral_window", "qwen2_tied"),
    bad=(
        Bad("projector_hidden_act = 'swish'", sets(projector_hidden_act="swish")),
        Bad("vision_feature_layer = -5", sets(vision_feature_layer=-5)),
        Bad("vision_feature_layer = [1, 4]", sets(vision_feature_layer=[1, 4])),
        Bad("vision_feature_layer = []", sets(vision_feature_layer=[])),
        Bad("vision_feature_layer = 0", sets(vision_feature_layer=0)),
        Bad("vision_feature_select_strategy", sets(vision_feature_select_strategy="cls")),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("llava-hf/llava-1.5-7b-hf", lambda c: c.pop("text_config")),
        Bad("text_config.model_type = 'gpt_neox'", sets("text_config", model_type="gpt_neox")),
        Bad("vocab_size is 280", sets("text_config", vocab_size=280)),
        Bad("vision_config.model_type = 'dinov2'", sets("vision_config", model_type="dinov2")),
        Bad("hidden_act = 'gelu_new'", sets("vision_config", hidden_act="gelu_new")),
        Bad("image_size = [48, 32]", sets("vision_config", image_size=[48, 32])),
        Bad("number of attention heads (3)", sets("vision_config", num_attention_heads=3)),
        Bad("56×56 px, the vision tower takes 48×48 px", sets("image_processor", crop_size=56), _PROCESSOR),
        Bad("40×48 px", sets("image_processor", crop_size={"height": 40, "width": 48}), _PROCESSOR),
        Bad("images of any size", sets("image_processor", do_center_crop=False), _PROCESSOR),
        Bad("longest_edge", sets("image_processor", size={"longest_edge": 48}), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("do_pad", sets("image_processor", do_pad=True), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("ViTImageProcessor", sets("image_processor", image_processor_type="ViTImageProcessor"), _PROCESSOR),
        Bad("preprocessor_config.json", lambda c: c.pop("image_processor"), _PROCESSOR),
        Bad("9 tokens for an image, the model makes 36", sets(patch_size=16), _PROCESSOR),
        Bad("35 tokens for an image, the model makes 36", sets(num_additional_image_tokens=0), _PROCESSOR),
        Bad("37 tokens for an image", sets(vision_feature_select_strategy="full"), _PROCESSOR),
        Bad("<picture>", sets(image_token="<picture>"), _PROCESSOR),
        Bad(
            "vision_tower.embeddings.position_embedding.weight",
            sets("vision_config", hidden_size=32),
            error="WeightsError",
            also=("[37, 64]", "[37, 32]"),
        ),
    ),
    needed=(
        Tensor(
            "language_model.model.embed_tokens.weight", told="model.language_model.embed_tokens.weight"
        ),  # another layout
        Tensor("vision_tower.encoder.layers.1.mlp.fc1.bias"),
        Tensor("multi_modal_projector.linear_2.weight"),
    ),
    unneeded=(Tensor("vision_tower.class_head.weight"), Tensor("language_model.model.layers.7.mlp.up_proj.weight")),
)
