#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0, Emu3's image processor: a Pillow image of three rows of pixels (or of one) is taken for three channels one behind
# the other, although a Pillow image has a known order. Wide and low pictures come out high and narrow, one row more makes them wide again.
"$T/v/bin/pip" -q install transformers==5.24.0 numpy==2.3.5 pillow==12.0.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
from PIL import Image
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

processor = Emu3ImageProcessor(min_pixels=32**2, max_pixels=64**2)
found = {}
for height in (2, 3, 4):
    made = processor.preprocess([Image.new("RGB", (350, height), "red")], return_tensors="np")
    found[height] = [int(side) for side in made["image_sizes"][0]]
    print(f"350 px wide, {height} px high: made {found[height][1]} px wide, {found[height][0]} px high")
assert found[2][1] > found[2][0]
assert found[3][1] < found[3][0]
assert found[4][1] > found[4][0]
PY
