#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
# Qwen2-VL's and Qwen2.5-VL's positions behind a video. transformers 4.57.6 (and the models' first code) lets the text go on behind the
# furthest position that the video takes on any of the three axes. transformers 5.24.0 looks at one frame's rows and columns alone: behind
# a video of more frames than those, the text begins at places on the first axis that later frames have, and the first token of an
# answer jumps from there to behind the video. Checkpoints were trained with the former.
for version in 4.57.6 5.24.0; do
  python3 -m venv "$T/$version"
  "$T/$version/bin/pip" -q install "transformers==$version" torch==2.13.0
  (cd "$T" && HF_HUB_OFFLINE=1 "$T/$version/bin/python" - "$version" 2>/dev/null <<'PY'
import sys
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
tower = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
config = Qwen2VLConfig(text_config=text, vision_config=tower, video_token_id=7, image_token_id=6, vision_start_token_id=5)
model = Qwen2VLForConditionalGeneration(config)
# Eight frames of 2 x 3 cells after two words (the second announces it), and three words behind.
ids = torch.tensor([[1, 5] + [7] * 48 + [2, 3, 4]])
given = {"input_ids": ids, "video_grid_thw": torch.tensor([[8, 4, 6]])}
if sys.argv[1].startswith("5"):
    given["mm_token_type_ids"] = (ids == 7).int() * 2
positions, delta = model.model.get_rope_index(**given)
first = positions[0, 0]
behind, answer = first[-3:].tolist(), ids.shape[1] + int(delta)
print(f"transformers {sys.argv[1]}: frames are at {first[2]} to {first[49]}, the words behind them at {behind}, the answer begins at {answer}")
expected = {"4.57.6": ([10, 11, 12], 13), "5.24.0": ([5, 6, 7], 10)}
assert (behind, answer) == expected[sys.argv[1]]
PY
  )
done
