"""transformers' own image processors that need torchvision, run as a program of its own, with torchvision on its path.

Arguments: a folder of checkpoints, and where the results go. Each checkpoint's `asked.json` says which `pictures`
(height, width, kind) make a prompt each, and of which `sizes` (height, width) the layout is wanted.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families.parity import make_image

ROOT = Path(__file__).parents[2]
TORCHVISION = ROOT / "build" / "torchvision"

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declared() -> Any:
    """What torchvision's compiled part declares, which may be made for another build of torch; resizing needs none of
    it. To be kept."""
    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.submodule_search_locations is not None
    (compiled,) = Path(found.submodule_search_locations[0]).glob("_C*.so")
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define(f"nms{_BOXES}")
        library.define(f"qnms{_BOXES}")
        return library
    return None


def picture(height: int, width: int, kind: str) -> Image.Image:
    """Smooth, or noise, where every rounding shows."""
    if kind == "smooth":
        return make_image(height, width, height)
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask_transformers(folder: Path) -> None:
    """Run this program for the checkpoints of `folder / "in"`, into `folder / "out"`."""
    if not (TORCHVISION / "torchvision").is_dir():
        pytest.fail(
            "transformers' image processor needs torchvision: python -m pip install --no-deps --target "
            "build/torchvision torchvision==0.28.0"
        )
    (folder / "out").mkdir()
    path = os.pathsep.join([str(ROOT), str(TORCHVISION)])
    command = [sys.executable, "-m", "tests.families.torchvision_processor", str(folder / "in"), str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lfm2_layout(processor: Any, height: int, width: int) -> list[int]:
    """Rows and columns of tiles, height and width of the whole, and the most patches that a grid may have."""
    own = processor.image_processor
    cells = (own.downsample_factor, own.min_image_tokens, own.max_image_tokens, own.encoder_patch_size)
    wide, high = own.smart_resize(height, width, *cells)
    large = own._is_image_too_large(
        height, width, own.max_image_tokens, own.encoder_patch_size, own.downsample_factor, own.max_pixels_tolerance
    )
    if not (large and own.do_image_splitting):
        return [1, 1, high, wide, own.max_num_patches]
    cols, rows, *_ = own._get_grid_layout(height, width, own.min_tiles, own.max_tiles, own.tile_size)
    return [rows, cols, high, wide, own.max_num_patches]


def perception_layout(processor: Any, height: int, width: int) -> list[int]:
    """Rows and columns of tiles."""
    own = processor.image_processor
    found = own._fit_image_to_canvas(img_width=width, img_height=height, tile_size=own.tile_size)
    if found is None:
        found = own._find_closest_aspect_ratio(img_width=width, img_height=height, tile_size=own.tile_size)
    return [found[1], found[0]]


def phi4_layout(processor: Any, height: int, width: int) -> list[int]:
    """Rows and columns of tiles, and of the patches that show something; zeros for a size that is refused."""
    own = processor.image_processor
    image, side = torch.zeros(3, height, width, dtype=torch.uint8), own.size["height"]
    try:
        whole, mask = own.dynamic_preprocess(image, side, own.patch_size, side // own.patch_size, own.dynamic_hd)
    except ValueError:
        return [0, 0, 0, 0]
    return [n // side for n in whole.shape[1:]] + [int(mask[:, 0].sum()), int(mask[0].sum())]


LAYOUTS = {
    "Lfm2VlImageProcessor": lfm2_layout,
    "PerceptionLMImageProcessor": perception_layout,
    "Phi4MultimodalImageProcessor": phi4_layout,
}


def main(folder: Path, out: Path) -> None:
    _library = declared()
    from transformers import AutoProcessor

    for checkpoint in sorted(folder.iterdir()):
        asked = json.loads((checkpoint / "asked.json").read_text())
        processor = AutoProcessor.from_pretrained(checkpoint)
        layout = LAYOUTS[type(processor.image_processor).__name__]
        layouts = [layout(processor, *size) for size in asked["sizes"]]
        found: dict[str, np.ndarray] = {"layouts": np.array(layouts)}
        for i, shown in enumerate(asked["pictures"]):
            images = [picture(*one) for one in shown]
            inputs = processor(text=processor.image_token * len(images) + "?", images=images, return_tensors="pt")
            found |= {f"{i}.{name}": tensor.numpy() for name, tensor in inputs.items()}
        np.savez(out / f"{checkpoint.name}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
