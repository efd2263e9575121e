"""GOT-OCR 2."""

from typing import Any

from tests.families.parity import PROMPTS
from tests.families.row import Bad, Row, Tensor, sets
from tests.tiny_got_ocr2 import save_tiny_got_ocr2

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}"
    "{{ '<img><imgpad></img>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "windows_and_one_whole_layer": {},
    "untied_windows_that_fit": {
        "vision": {"window_size": 5, "global_attn_indexes": [2, 0], "qkv_bias": False, "hidden_act": "relu"},
        "config": {"tie_word_embeddings": False},
        "template": _TEMPLATE,
    },
    "no_windows_odd_side_sharded": {
        "vision": {"window_size": 0, "image_size": 40},
        "shard_size": "100KB",
        "seed": 3,
    },
    "state_dict_names_asks_for_patches": {
        "names": "state_dict",
        "config": {"tie_word_embeddings": False},
        "image_settings": {"crop_to_patches": True, "resample": 2, "image_mean": [0.4, 0.5, 0.6]},
    },
}
CASES = {
    **PROMPTS,
    "strip": ("Read.", [(3, 350)]),
    "large": (" OCR with format: ", [(401, 517)]),
    "pixel": ("What?", [(1, 1)]),
}
_PROCESSOR = "processor_config.json"

ROW = Row(
    "got_ocr2",
    save_tiny_got_ocr2,
    CONFIGS,
    CASES,
    compared=("windows_and_one_whole_layer",),
    probed=("windows_and_one_whole_layer",),
    spared={
        "calibration": "the tower is that of deepseek_vl_hybrid, the decoder that of llava_onevision",
        "eight_bits": "the tower is that of deepseek_vl_hybrid, the decoder that of llava_onevision",
        "int8_cache": "llava_onevision's decoder",
        "segments": "llava_onevision's decoder",
        "speculation": "llava_onevision's decoder",
    },
    placeholder="<imgpad>",
    bad=(
        Bad("use_rel_pos = False", sets("vision_config", use_rel_pos=False)),
        Bad("use_abs_pos = False", sets("vision_config", use_abs_pos=False)),
        Bad("global_attn_indexes [7]", sets("vision_config", global_attn_indexes=[7])),
        Bad("hidden_act = 'swish'", sets("vision_config", hidden_act="swish")),
        Bad("56×56 px", sets("image_processor", size={"height": 56, "width": 56}), _PROCESSOR),
        Bad("images of any size", sets("image_processor", do_resize=False), _PROCESSOR),
        Bad("do_rescale", sets("image_processor", do_rescale=False), _PROCESSOR),
        Bad("resample", sets("image_processor", resample=9), _PROCESSOR),
        Bad("image_token_id = 3", sets(image_token_index=3)),
        Bad("pos_embed", sets("vision_config", patch_size=16), error="WeightsError"),
    ),
    needed=(
        Tensor("multi_modal_projector.conv_upsampler2.weight"),
        Tensor("vision_tower.neck.conv2.weight"),
        Tensor("vision_tower.layers.1.attn.rel_pos_h"),
    ),
    unneeded=(
        Tensor("multi_modal_projector.conv_upsampler3.weight"),
        Tensor("vision_tower.layers.7.mlp.lin1.weight"),
        Tensor("language_model.model.layers.7.mlp.up_proj.weight"),
    ),
    tokens=("<img>", "</img>"),
)
