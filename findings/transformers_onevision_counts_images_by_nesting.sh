#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: LLaVA-OneVision's image processor takes two images in one list for two prompts and cuts each into tiles;
# in a list within a list they are one prompt's, and each becomes a single padded tile. apply_chat_template passes the second form:
# the same two images give another number of tokens by the way they were handed over.
"$T/v/bin/pip" -q install transformers==5.24.0 pillow==12.0.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import numpy as np
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

pixels = np.zeros((768, 768, 3), np.uint8)
pair = [Image.fromarray(pixels), Image.fromarray(pixels)]
processor = LlavaOnevisionImageProcessorPil()
flat, nested = ([len(image) for image in processor(images)["pixel_values"]] for images in (pair, [pair]))
print(f"tiles of two images in a list: {flat}; in a list within a list: {nested}")
assert flat == [5, 5]
assert nested == [1, 1]
PY
