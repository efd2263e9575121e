#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: AriaProcessor has settings of its own (max_image_size 980, split_image False), which come before those of the
# image processor in preprocessor_config.json: a checkpoint that states max_image_size 490 gets images of 980 px all the same,
# with twice the tokens. The image processor alone goes by the file.
"$T/v/bin/pip" -q install transformers==5.24.0 pillow==12.0.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AriaProcessor, PreTrainedTokenizerFast
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

core = Tokenizer(models.WordLevel({"a": 0, "<|img|>": 1}, unk_token="a"))
core.add_special_tokens(["<|img|>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens={"image_token": "<|img|>"}, pad_token="a")
images = AriaImageProcessorPil(max_image_size=490, split_image=True)
picture = Image.new("RGB", (300, 200))
alone = images([picture], return_tensors="np")["pixel_values"].shape
inputs = AriaProcessor(images, tokenizer)(text="<|img|>", images=[picture], return_tensors="np")
tokens = int((inputs["input_ids"] == 1).sum())
print(f"max_image_size 490: the image processor makes {alone}, the processor {inputs['pixel_values'].shape}, {tokens} tokens")
assert alone[-1] == 490
assert inputs["pixel_values"].shape == (1, 3, 980, 980)
assert tokens == 256
PY
