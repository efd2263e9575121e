#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: one folder, two readers, two chat templates. An older chat_template.json wins over a newly saved
# chat_template.jinja in the processor; the tokenizer of the same folder reads the .jinja.
"$T/v/bin/pip" -q install transformers==5.24.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import json
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin

folder = Path("m")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
tokenizer.save_pretrained(folder)
(folder / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
tokenizer.chat_template = "new"
tokenizer.save_pretrained(folder)
assert (folder / "chat_template.jinja").read_text() == "new"
of_processor = ProcessorMixin.get_processor_dict(folder)[0]["chat_template"]
of_tokenizer = AutoTokenizer.from_pretrained(folder).chat_template
print(f"after saving a new template: the processor renders {of_processor!r}, the tokenizer {of_tokenizer!r}")
assert (of_processor, of_tokenizer) == ("old", "new")
PY
