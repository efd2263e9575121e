"""Granite 4 Vision."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_granite4 import save_tiny_granite4_vision

CONFIGS: dict[str, dict[str, Any]] = {
    "windows_of_four_patches": {},
    "clip_larger_windows_no_template": {
        "vision": {"model_type": "clip_vision_model", "image_size": 64, "hidden_size": 128},
        "config": {
            "vision_feature_select_strategy": "default",
            "downsample_rate": "2/4",
            "image_grid_pinpoints": [[64, 64], [64, 128], [128, 64]],
            "deepstack_layer_map": [[-1, 3], [1, 0]],
            "spatial_vision_layer": -2,
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 3,
                "intermediate_size": 96,
                "cross_attention_frequency": 2,
            },
        },
        "template": None,
    },
    "tied_sharded": {
        "text": {"attention_bias": True, "tie_word_embeddings": True},
        "config": {"tie_word_embeddings": True, "deepstack_layer_map": [[0, 3]], "spatial_target_layers": [5, 4, 0, 2]},
        "shard_size": "300KB",
        "seed": 3,
    },
    "state_dict_names": {"names": "state_dict"},
}
CASES = {**PROMPTS, "tall": ("What does it say?", [(300, 40)]), "pixel": ("What?", [(1, 1)])}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "granite4_vision",
    save_tiny_granite4_vision,
    CONFIGS,
    CASES,
    compared=("windows_of_four_patches",),
    spared={
        "calibration": "tower as that of llava, the decoder is granite_docling's",
        "int8_cache": "granite_docling's decoder",
        "segments": "a decoder as llava's, features of layers as qwen3_vl's",
        "speculation": "granite_docling's decoder",
    },
    bad=(
        Bad("layer 0 among them", sets(deepstack_layer_map=[[-1, 3]])),
        Bad("each layer of the decoder once", sets(deepstack_layer_map=[[-1, 0], [-2, 1]])),
        Bad("spatial_target_layers = [1, 2, 4]", sets(spatial_target_layers=[1, 2, 4])),
        Bad("[0, 1, 2, 4, 6] of 6", sets(spatial_target_layers=[1, 2, 4, 6])),
        Bad("of the tower, which has 3", sets(spatial_vision_layer=7)),
        Bad("downsample_rate = '1/4'", sets(downsample_rate="1/4")),
        Bad("downsample_rate = 'half'", sets(downsample_rate="half")),
        Bad("hidden_act = 'swish'", lambda c: c["qformer_config"].update(hidden_act="swish")),
        Bad("use_qformer_text_input = True", lambda c: c["qformer_config"].update(use_qformer_text_input=True)),
        Bad("vision_config.model_type = 'dinov2'", sets("vision_config", model_type="dinov2")),
        Bad("makes 35 features", sets(vision_feature_select_strategy="default")),
        Bad("image_grid_pinpoints of model", sets(image_grid_pinpoints=[[48, 48]])),
        Bad("no text_config", lambda c: c.pop("text_config")),
        Bad("36 tokens for an image, the model makes 9", sets(downsample_rate="1/1"), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("gate_proj", sets("text_config", intermediate_size=256), error="WeightsError"),
    ),
    needed=(
        Tensor("model.image_newline"),
        Tensor("model.spatial_projectors.3.query"),
        Tensor("model.layerwise_projectors.0.qformer.encoder.layer.0.crossattention.output.LayerNorm.weight"),
        Tensor("model.language_model.norm.weight"),
    ),
    unneeded=(
        Tensor("model.layerwise_projectors.1.query"),
        Tensor("model.multi_modal_projector.linear_1.weight"),
        Tensor("model.language_model.layers.7.mlp.up_proj.weight"),
    ),
)
