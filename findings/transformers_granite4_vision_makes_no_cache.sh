#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0, Granite 4 Vision called with use_cache=True and no cache: its language model makes none, where others do (LLaVA here),
# and says nothing. A loop that feeds one token at a time with what came back computes each token as if it were the first; generate()
# hands in a cache of its own and is right.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes}
text, ids, made = {"vocab_size": 64, **sizes}, torch.tensor([[5, 9, 14]]), {}
llava = LlavaConfig(text_config={"model_type": "llama", **text}, vision_config=vision, image_token_index=63)
granite = Granite4VisionConfig(
    text_config=text, vision_config=vision, image_token_index=63, deepstack_layer_map=[[-1, 0]], downsample_rate="1/2"
)
for name, cls, config in (
    ("LLaVA", LlavaForConditionalGeneration, llava),
    ("Granite 4 Vision", Granite4VisionForConditionalGeneration, granite),
):
    with torch.no_grad():
        out = cls(config).eval()(input_ids=ids, use_cache=True)
    made[name] = out.past_key_values is not None
    print(f"{name}: called with use_cache=True, it {'returns' if made[name] else 'returns no'} cache")
assert made == {"LLaVA": True, "Granite 4 Vision": False}
PY
