#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0, Ovis 2's image processor with crop_to_patches: the grid of tiles is looked for as rows × columns and then taken
# as columns × rows. A picture that is twice as wide as high, which two tiles side by side would show undistorted, is stretched to two
# tiles one below the other, and the prompt says so (two rows); a high one is stretched to a wide one.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0 pillow==12.0.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import numpy as np
from PIL import Image
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

processor = Ovis2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=9)
found = {}
for width, height in ((896, 448), (448, 896), (1344, 448)):
    made = processor.preprocess([Image.fromarray(np.zeros((height, width, 3), np.uint8))], return_tensors="np")
    found[width, height] = [int(n) for n in made["grids"][0]]
    print(f"{width} px wide, {height} px high: {found[width, height][0]} rows of {found[width, height][1]} tiles")
assert found == {(896, 448): [2, 1], (448, 896): [1, 2], (1344, 448): [3, 1]}
PY
