"""transformers' own models with towers of timm, run as a program of its own with timm and torchvision on its path.

Arguments: a folder of checkpoints, and a file for what comes out: the features that each makes of `pixels` of a seed,
and the names and shapes of the tensors of published towers.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.torchvision_processor import declared

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "build" / "timm", ROOT / "build" / "torchvision")
# As checkpoints have them; the class of FastVLM's sizes is that of timm.
PUBLISHED: dict[str, dict[str, Any]] = {
    "fastvit_mci3": {"inference_mode": True},
    "vit_pe_core_large_patch14_336": {"depth": 23},
    "vit_pe_core_gigantic_patch14_448": {"depth": 47},
}
PERCEPTION = {
    **{"global_pool": "", "init_values": 0.1, "use_post_transformer_norm": False},
    **{"img_size": (448, 448), "ref_feat_shape": (32, 32)},
}


def published(name: str) -> dict[str, Any]:
    """The options of a published tower."""
    return PUBLISHED[name] if name == "fastvit_mci3" else {**PERCEPTION, **PUBLISHED[name]}


def features(model: Any) -> np.ndarray:
    """Of two images of a model's own size."""
    options = model.config.vision_config.model_args
    side = options["img_size"][0] if "img_size" in options else 192
    pixels = torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    given = pixels[None] if model.config.model_type == "perception_lm" else pixels
    with torch.no_grad():
        return model.model.get_image_features(given, return_dict=True).pooler_output.numpy()


def shapes(tower: torch.nn.Module) -> list[str]:
    """Names and shapes of its tensors."""
    return sorted(f"{name} {list(tensor.shape)}" for name, tensor in tower.state_dict().items())


def of_timm(checkpoints: Path) -> dict[str, np.ndarray]:
    """What this program writes of a folder of checkpoints."""
    for package in PACKAGES:
        if not (package / package.name).is_dir():
            pytest.fail("timm's tower needs timm and torchvision in folders of their own: make build/timm/.installed")
    out = checkpoints.with_name("timm.npz")
    path = os.pathsep.join(map(str, (ROOT, *PACKAGES)))
    command = [sys.executable, "-m", "tests.families.timm_tower", str(checkpoints), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def main(folder: Path, out: Path) -> None:
    _library = declared()
    import timm
    from transformers import AutoModelForImageTextToText

    found: dict[str, np.ndarray] = {}
    for checkpoint in sorted(folder.iterdir()):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        assert type(model.model.vision_tower.timm_model).__module__.startswith("timm.models.")
        found[checkpoint.name] = features(model)
    for name in PUBLISHED:
        with torch.device("meta"):
            tower = timm.create_model(name, pretrained=False, num_classes=0, **published(name))
        found[f"shapes.{name}"] = np.array(shapes(tower))
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
