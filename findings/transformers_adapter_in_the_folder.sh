#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0 with peft 0.21.2 installed: from_pretrained of a folder adds a LoRA adapter that happens to lie in it (as some
# training scripts leave it there) to the model, without a word; without peft the same call gives the plain model.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0 peft==0.21.2
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import shutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
plain = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
plain.save_pretrained("m")
tuned = get_peft_model(AutoModelForCausalLM.from_pretrained("m"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
tuned.save_pretrained("a")
for name in ("adapter_config.json", "adapter_model.safetensors"):
    shutil.copy(f"a/{name}", f"m/{name}")
loaded = AutoModelForCausalLM.from_pretrained("m").eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    difference = float((loaded(ids).logits - plain.eval()(ids).logits).abs().max())
has = any("lora" in name for name, _ in loaded.named_modules())
print(f"the folder's model has LoRA modules: {has}; its logits differ from the saved model's by {difference:.3f}")
assert has and difference > 1e-3
PY
