"""transformers' own FastVLM, with timm's tower, run as a program of its own with timm and torchvision on its path.

Arguments: a folder of checkpoints, and a file for what comes out: the features that each makes of `pixels` of a seed,
and the names and shapes of the published tower's tensors.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from tests.families.torchvision_processor import declared

SIDE = 192


def pixels() -> torch.Tensor:
    """Two images."""
    return torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


def main(folder: Path, out: Path) -> None:
    _library = declared()
    import timm
    from transformers import AutoModelForImageTextToText

    found: dict[str, np.ndarray] = {}
    for checkpoint in sorted(folder.iterdir()):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        assert type(model.model.vision_tower.timm_model).__module__ == "timm.models.fastvit"
        with torch.no_grad():
            found[checkpoint.name] = model.model.get_image_features(pixels(), return_dict=True).pooler_output.numpy()
    with torch.device("meta"):
        tower = timm.create_model("fastvit_mci3", pretrained=False, num_classes=0, inference_mode=True)
    shapes = [f"{name} {list(tensor.shape)}" for name, tensor in tower.state_dict().items()]
    np.savez(out, shapes=np.array(sorted(shapes)), **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
