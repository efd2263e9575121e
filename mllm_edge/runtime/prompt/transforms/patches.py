"""Patches: the last transform, which changes the shape of pixel values."""

import numpy as np

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.transforms.cut import Cut
from mllm_edge.spec import Patchify

__all__ = ["patches_cut", "patchified"]


def patches_cut(cut: Cut, transform: Patchify) -> Cut:
    """The grid of cells; raises ImageError for a size that is none."""
    side = transform.patch * transform.merge
    if cut.slices > 1:
        raise BundleError("patchify comes after a transform that makes tiles", "export the bundle again")
    if cut.height % side or cut.width % side:
        raise ImageError(
            f"{cut.height}×{cut.width} px cannot be cut into whole cells of {side}×{side} px",
            "the bundle must resize to a multiple of the cell before it cuts: export it again",
        )
    rows, cols = cut.height // side, cut.width // side
    return Cut(side, side, rows, cols, rows * cols)


def patchified(planes: np.ndarray, transform: Patchify, cut: Cut) -> np.ndarray:
    """planes [C, height, width] → cells [cells, merge², C · frames · patch²]."""
    channels, merge, patch = len(planes), transform.merge, transform.patch
    split = planes.reshape(channels, cut.rows, merge, patch, cut.cols, merge, patch)
    places = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    frames = np.broadcast_to(places, (*places.shape[:5], transform.frames, patch, patch))
    return frames.reshape(cut.slices, merge**2, -1)
