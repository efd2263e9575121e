"""Which patches of an image's tiles show something of it."""

import numpy as np

from mllm_edge.runtime.backends.base import HIDDEN
from mllm_edge.runtime.prompt.learned_grid import learned_places
from mllm_edge.runtime.prompt.transforms.cut import Cut
from mllm_edge.spec import ShownPatches

__all__ = ["shown_inputs", "shown_patches"]


def shown_patches(cut: Cut, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of `patch` px that show something, of all tiles of a cut together."""
    height, width = cut.rows * cut.height, cut.cols * cut.width
    high, wide = cut.shown or (height, width)
    return (height - (height - high) // patch * patch) // patch, (width - (width - wide) // patch * patch) // patch


def shown_inputs(spec: ShownPatches, cut: Cut) -> dict[str, np.ndarray]:
    """What ShownPatches describes, of the tiles of a cut and the overview before them, by the names of the inputs."""
    down, across = cut.height // spec.patch, cut.width // spec.patch
    rows, cols = shown_patches(cut, spec.patch)
    grids = [(min(rows - r * down, down), min(cols - c * across, across)) for r, c in np.ndindex(cut.rows, cut.cols)]
    places = np.zeros((1 + len(grids), down, across), np.int64)
    bias = np.full((1 + len(grids), down, across), HIDDEN, np.float32)
    for i, (high, wide) in enumerate([(down, across), *grids]):
        first, second = (learned_places(spec.bounds, count) for count in (high, wide))
        places[i, :high, :wide] = first[:, None] * spec.side + second
        bias[i, :high, :wide] = 0
    made = places.reshape(len(places), -1), bias.reshape(len(bias), 1, 1, -1)
    return dict(zip(spec.names, made, strict=True))
