#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# transformers 5.24.0, Phi-4 multimodal's vision tower with its default attention (sdpa): patches look at those before them alone where all
# patches of all tiles show something, and at all patches where one tile anywhere has padding, or with attn_implementation="eager". So the
# features of a picture that fills its tiles change with what stands beside it; the tower was trained to look both ways. Its attention
# layers say is_causal = True, which counts where no mask is given.
"$T/v/bin/pip" -q install transformers==5.24.0 torch==2.13.0
cd "$T" && HF_HUB_OFFLINE=1 "$T/v/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalVisionConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalVisionModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
config = Phi4MultimodalVisionConfig(image_size=64, patch_size=16, crop_size=64, **sizes)
torch.manual_seed(0)
model = Phi4MultimodalVisionModel(config).eval()
tile = torch.randn(1, 3, 64, 64)
other = tile.clone()
other[..., 48:, 48:] += 1  # the last patch
full, padded = torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
padded[:, 3:] = False


def first(pixels, *beside):
    """The first patch of the first of some tiles, the others with padding."""
    tiles, masks = torch.cat([pixels, *beside]), torch.cat([full, *(padded for _ in beside)])
    with torch.no_grad():
        return model(tiles, patch_attention_mask=masks).last_hidden_state[0, 0]


seen = {}
for name, beside in (("alone", ()), ("beside a tile with padding", (tile,))):
    seen[name] = not torch.allclose(first(tile, *beside), first(other, *beside), atol=1e-5)
    print(f"a full tile {name}: its first patch {'sees' if seen[name] else 'does not see'} its last one")
model.set_attn_implementation("eager")
seen["eager"] = not torch.allclose(first(tile), first(other), atol=1e-5)
print(f"a full tile alone, eager attention: its first patch {'sees' if seen['eager'] else 'does not see'} its last one")
assert seen == {"alone": False, "beside a tile with padding": True, "eager": True}
PY
