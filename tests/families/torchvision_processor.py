"""transformers' own image processor of LFM2-VL, run as a program of its own, with torchvision on its path.

Arguments: a folder of checkpoints, and where the results go. Each checkpoint's `asked.json` says which `pictures`
(height, width, kind) make a prompt each, and of which `sizes` (height, width) the layout is wanted.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def layout(processor: Any, height: int, width: int) -> list[int]:
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


def main(folder: Path, out: Path) -> None:
    _library = declared()
    from transformers import AutoProcessor

    from tests.families.test_lfm2_vl import picture

    for checkpoint in sorted(folder.iterdir()):
        asked = json.loads((checkpoint / "asked.json").read_text())
        processor = AutoProcessor.from_pretrained(checkpoint)
        assert type(processor.image_processor).__name__ == "Lfm2VlImageProcessor"
        layouts = [layout(processor, *size) for size in asked["sizes"]]
        found: dict[str, np.ndarray] = {"layouts": np.array(layouts)}
        for i, shown in enumerate(asked["pictures"]):
            images = [picture(*one) for one in shown]
            inputs = processor(text="<image>" * len(images) + "?", images=images, return_tensors="pt")
            found |= {f"{i}.{name}": tensor.numpy() for name, tensor in inputs.items()}
        np.savez(out / f"{checkpoint.name}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
