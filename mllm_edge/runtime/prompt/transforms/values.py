"""Transforms of values: on a table of the 256 that a channel's pixel can have."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.errors import BundleError
from mllm_edge.runtime.prompt.learned_grid import cubic
from mllm_edge.spec import Normalize, Rescale

__all__ = ["VALUES", "look_up", "with_whole"]


def _rescale(table: np.ndarray, transform: Rescale) -> np.ndarray:
    return (table.astype(np.float64) * transform.factor).astype(np.float32)


def _normalize(table: np.ndarray, transform: Normalize) -> np.ndarray:
    mean, std = (np.array(values, np.float32)[:, None] for values in (transform.mean, transform.std))
    if len(mean) != len(table) or len(std) != len(table):
        raise BundleError(f"normalize has {len(mean)} means and {len(std)} stds", "export the bundle again")
    return (table - mean) / std


def look_up(tiles: list[Image.Image], table: np.ndarray) -> np.ndarray:
    """pixel_values [tiles, C, H, W] float32: of every pixel what `table` [C, 256] has for it."""
    width, height = tiles[0].size
    pixel_values = np.empty((len(tiles), len(table), height, width), np.float32)
    for tile, planes in zip(tiles, pixel_values, strict=True):
        pixels = np.asarray(tile)
        for channel, plane in enumerate(planes):
            # uint8 indices are always in range; "clip" only spares numpy a buffer.
            np.take(table[channel], pixels[..., channel], out=plane, mode="clip")
    return pixel_values


def with_whole(tiles: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """tiles [rows · cols, C, H, W] float32 → [1 + rows · cols, C, H, W]: before them what WholeBefore describes."""
    channels, height, width = tiles.shape[1:]
    grid = tiles.reshape(rows, cols, channels, height, width).transpose(2, 0, 3, 1, 4)
    whole = cubic(grid.reshape(channels, rows * height, cols * width), height, width)
    return np.concatenate([whole[None], tiles])


VALUES: Mapping[type, Callable[[np.ndarray, Any], np.ndarray]] = {Rescale: _rescale, Normalize: _normalize}
