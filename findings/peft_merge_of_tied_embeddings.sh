#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# peft 0.21.2: LoRA on the embeddings of a model with tied embeddings. The model that PEFT merges is not the one that was trained: its
# output layer shares the merged matrix, which during training it did not see.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0 peft==0.21.2
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)).eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    trained = tuned(ids).logits.clone()
    merged = tuned.merge_and_unload().eval()(ids).logits
difference = float((trained - merged).abs().max())
print(f"logits of the merged model differ from the trained one's by {difference:.3f} of {float(trained.abs().max()):.3f}")
assert difference > 1e-3
PY
