"""Patches: the last transform, which changes the shape of pixel values."""

from collections.abc import Sequence

import numpy as np

from mllm_edge.errors import ImageError
from mllm_edge.runtime.prompt.transforms.cut import Cut
from mllm_edge.spec import Patchify

__all__ = ["frames_joined", "patches_cut", "patchified"]


def patches_cut(cut: Cut, transform: Patchify) -> Cut:
    """The grids of cells; raises ImageError for a size that makes none."""
    side = transform.patch * transform.merge
    sizes = [*cut.sizes] or [(cut.height, cut.width)] * cut.slices
    if cut.overview is not None:
        sizes[-1] = cut.overview
    for height, width in sizes:
        if height % side or width % side:
            raise ImageError(
                f"{height}×{width} px cannot be cut into whole cells of {side}×{side} px",
                "the bundle must resize to a multiple of the cell before it cuts: export it again",
            )
    grids = tuple((height // side, width // side) for height, width in sizes)
    rows, cols = grids[0] if len(grids) == 1 else (cut.rows, cut.cols)
    return Cut(side, side, rows, cols, sum(rows * cols for rows, cols in grids), grids=grids)


def patchified(planes: np.ndarray, transform: Patchify) -> np.ndarray:
    """planes [C, height, width] → cells [cells, merge², C · frames · patch²]."""
    (channels, height, width), merge, patch = planes.shape, transform.merge, transform.patch
    split = planes.reshape(channels, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch)
    places = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    frames = np.broadcast_to(places, (*places.shape[:5], transform.frames, patch, patch))
    return frames.reshape(split.shape[1] * split.shape[4], merge**2, -1)


def frames_joined(frames: Sequence[np.ndarray], channels: int) -> np.ndarray:
    """Cells of single frames, each [cells, merge², C · patch²] → cells of all of them [cells, merge², C · frames ·
    patch²]."""
    cells, places, _ = frames[0].shape
    return np.stack([frame.reshape(cells, places, channels, -1) for frame in frames], axis=3).reshape(cells, places, -1)
