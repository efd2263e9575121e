#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0, PaliGemma without token_type_ids (text alone, as a tokenizer gives it): which tokens see each other depends on
# whether a batch needs padding. A prompt alone is looked at in both directions; beside a longer one, where padding makes a mask, the
# same prompt is causal, and its next token's logits are others. With token_type_ids of zeros both are the same.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {"model_type": "gemma", "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, **sizes}
vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16, **sizes}
config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=63)
model = PaliGemmaForConditionalGeneration(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
short, long = list(range(1, 7)), list(range(11, 21))
def last(rows, types):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    more = {"token_type_ids": torch.zeros_like(ids)} if types else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more).logits[0, -1]
told = {}
for types in (False, True):
    alone, beside = last([short], types), last([short, long], types)
    told[types] = float((alone - beside).abs().max() / alone.abs().max())
print(f"the same prompt alone and beside a longer one: logits differ by {told[False]:.2f} of their size; with token_type_ids by {told[True]:.1e}")
assert told[False] > 0.05 and told[True] < 1e-4
PY
