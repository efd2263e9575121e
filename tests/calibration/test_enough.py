"""How many pictures calibrate a tower."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mllm_edge.calibration.calibrate import _enough
from mllm_edge.calibration.collect import Feeds
from mllm_edge.spec import TensorSpec, Variant

PATCHES = 1024


def tower() -> Variant:
    inputs = (TensorSpec("pixel_values", "float32", ("tiles", 1)),)
    outputs = (TensorSpec("vision_hidden", "float32", ("tiles", PATCHES, 8)),)
    return Variant("cpu", "contrib", "float32", "vision_encoder.onnx", inputs, outputs)


@pytest.fixture
def feeds(tmp_path: Path) -> Feeds:
    """128 runs of one tile each."""
    found = Feeds(tmp_path)
    tmp_path.mkdir(exist_ok=True)
    for i in range(128):
        found.add({"pixel_values": np.full((1, 1), i, np.float32)})
    return found


@pytest.mark.parametrize(
    ("shape", "count", "runs"),
    [((768, 3072), 60, 72), ((768, 768), 400, 64), ((8, 8), 4, 128), ((768, 49152), 60, 128)],
)
def test_rows_for_the_widest_layer_or_all_where_they_are_cheap(
    feeds: Feeds, shape: tuple[int, int], count: int, runs: int
) -> None:
    layers: Any = [SimpleNamespace(shape=shape)] * count
    chosen = feeds.spread(_enough(feeds, tower(), layers))
    assert len(chosen) == runs
    numbers = [int(chosen.read(i, ["pixel_values"])["pixel_values"][0, 0]) for i in range(runs)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert 127 - numbers[-1] < 128 / runs
