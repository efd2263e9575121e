#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: loading a processor of class Idefics3Processor adds tokens to the tokenizer that is handed to it, those of
# its markers that the vocabulary lacks, with the next free ids; the embeddings of the model know nothing of them.
"$T/v/bin/pip" -q install transformers==5.24.0 pillow==12.0.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
from tokenizers import Tokenizer, models
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<image>": 1}, unk_token="a")))
before = len(tokenizer)
Idefics3Processor(Idefics3ImageProcessorPil(), tokenizer)
added = {token: i for token, i in tokenizer.get_vocab().items() if i >= before}
print(f"tokens before {before}, after {len(tokenizer)}: {added}")
assert set(added) == {"<fake_token_around_image>", "<end_of_utterance>"}
PY
