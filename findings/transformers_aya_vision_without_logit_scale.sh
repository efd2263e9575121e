#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: Cohere 2 multiplies its logits by `logit_scale` (0.25 in Command R7B), and Aya Vision, whose language model is a
# Cohere 2 with such a configuration, does not: the same weights give logits that are larger by 1/logit_scale. Greedy answers agree;
# drawn ones are those of a temperature that is smaller by that factor.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, Cohere2ForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {"vocab_size": 64, "num_key_value_heads": 1, "logit_scale": 0.25, "pad_token_id": 0, **sizes}
vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16, "vision_use_head": False, **sizes}
config = AyaVisionConfig(text_config={"model_type": "cohere2", **text}, vision_config=vision, image_token_index=63)
aya, alone = AyaVisionForConditionalGeneration(config).eval(), Cohere2ForCausalLM(Cohere2Config(**text)).eval()
alone.model.load_state_dict(aya.model.language_model.state_dict())
alone.lm_head.load_state_dict(aya.lm_head.state_dict())
ids = torch.tensor([[5, 9, 14, 3]])
with torch.no_grad():  # without the padding's token, whose row is zeros
    ratio = aya(input_ids=ids).logits[..., 1:] / alone(input_ids=ids).logits[..., 1:]
print(f"the same weights and tokens: Aya Vision's logits over Cohere 2's are {ratio.median():.2f} (logit_scale 0.25)")
assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=1e-3)
PY
