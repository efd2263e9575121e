#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0: the vision tower of Llama 3.2 Vision (MllamaVisionModel) hides the tiles that an image does not have only
# from each other. The tiles that it has attend to them: what stands in a missing tile changes an image's own features.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0 numpy
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

torch.manual_seed(0)
config = MllamaVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    attention_heads=4,
    num_hidden_layers=2,
    num_global_layers=1,
    image_size=28,
    patch_size=14,
    max_num_tiles=4,
    intermediate_layers_indices=[0],
    supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
)
model = MllamaVisionModel(config).eval()
for parameter in model.parameters():
    parameter.data = 0.2 * torch.randn_like(parameter)
pixels = torch.randn(1, 1, 4, 3, 28, 28)
other = pixels.clone()
other[:, :, 1:] = torch.randn(1, 1, 3, 3, 28, 28)
ids, mask = torch.tensor([[1]]), torch.tensor([[[1, 0, 0, 0]]])  # an image of one tile: the others are missing
with torch.no_grad():
    first, second = (model(x, ids, mask).last_hidden_state[:, :, 0] for x in (pixels, other))
change = ((first - second).norm() / first.norm()).item()
print(f"missing tiles with other contents change the features of the only tile by {change:.1%}")
assert change > 1e-3
PY
