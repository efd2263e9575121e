#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# peft 0.21.2: loading an adapter whose tensors name modules that the model lacks (here: of before the models were renamed) leaves
# every one of them out; the model answers as if there were no adapter, and only a warning says so.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0 peft==0.21.2
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained("m")
def fresh():
    return AutoModelForCausalLM.from_pretrained("m").eval()
tuned = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj"]))
for name, parameter in tuned.named_parameters():
    if "lora_B" in name:
        parameter.data = torch.randn_like(parameter)
tuned.save_pretrained("a")
file = "a/adapter_model.safetensors"
tensors = load_file(file)
ids = torch.arange(8)[None]
def difference():
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(fresh(), "a").eval()
        return float((model(ids).logits - fresh()(ids).logits).abs().max()), len(told)
whole, _ = difference()
save_file({name.replace(".model.layers.", ".decoder.layers."): t for name, t in tensors.items()}, file)
renamed, warned = difference()
print(f"change of logits by the adapter: {whole:.3f}; under other module names: {renamed}, with {warned} warning(s) and no error")
assert whole > 1e-3 and renamed == 0.0 and warned >= 1
PY
