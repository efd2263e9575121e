"""Sizes of runs on TensorRT: what shapes say, and how they are rounded up."""

from typing import Any

import numpy as np
import pytest

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import HIDDEN
from mllm_edge.runtime.backends.tensorrt_session import _write
from mllm_edge.runtime.backends.tensorrt_sizes import Rounding, Sizes, bounds, shape_of
from mllm_edge.spec import TensorSpec

EMBEDS = TensorSpec("inputs_embeds", "float16", ("batch", "sequence", 8))
BIAS = TensorSpec("attention_bias", "float16", ("batch", 1, "sequence", "length"))
INPUTS = {t.name: t for t in (EMBEDS, BIAS)}
PROFILE = {"inputs_embeds": ((1, 1, 8), (2, 16, 8)), "attention_bias": ((1, 1, 1, 1), (4, 1, 16, 256))}


def in_place(**changes: Any) -> Rounding:
    return Rounding(**{"kv_mode": "in_place", "capacity": 256, "doubling": False, "widens": True, **changes})


@pytest.mark.parametrize(
    ("tokens", "length", "wide", "span"),
    [(1, 1, 1, 64), (1, 64, 1, 64), (1, 65, 1, 128), (3, 64, 4, 128), (5, 20, 8, 64), (16, 256, 16, 256)],
)
def test_in_place(tokens: int, length: int, wide: int, span: int) -> None:
    sizes = {"batch": 1, "sequence": tokens, "rows": tokens, "length": length}
    assert in_place().decode(sizes, 0) == {"batch": 1, "sequence": wide, "rows": wide, "length": span}


def test_nothing_is_written_behind_the_end_of_the_cache() -> None:
    sizes = {"batch": 1, "sequence": 3, "rows": 3, "length": 256}
    assert in_place().decode(sizes, 0) == sizes


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 200])
def test_doubling(length: int) -> None:
    found = in_place(doubling=True).prefill({"batch": 1, "sequence": 1, "length": length})["length"]
    assert found == next(span for span in (64, 128, 256) if span >= length)


def test_batches_and_recurrent_state_keep_their_widths() -> None:
    sizes = {"batch": 2, "sequence": 3, "rows": 1, "length": 20}
    assert in_place().decode(sizes, 0) == sizes | {"length": 64}
    alone = sizes | {"batch": 1}
    assert in_place(widens=False).decode(alone, 0) == alone | {"length": 64}


@pytest.mark.parametrize(
    ("past", "room", "rounded"),
    [(0, 256, 64), (0, 0, 1), (1, 256, 64), (64, 256, 64), (65, 256, 128), (250, 255, 255), (70, 0, 70)],
)
def test_append(past: int, room: int, rounded: int) -> None:
    sizes = {"batch": 1, "sequence": 3, "rows": 1, "past": past, "length": past + 3}
    found = in_place(kv_mode="append").decode(sizes, room)
    assert found == {"batch": 1, "sequence": 4, "rows": 1, "past": rounded, "length": rounded + 4}
    behind = max(past, 1)  # an empty past is a hidden row
    assert in_place(kv_mode="append").prefill(sizes) == sizes | {"past": behind, "length": behind + 3}


def test_bounds_are_the_narrowest() -> None:
    assert bounds(INPUTS, PROFILE) == {"batch": (1, 2), "sequence": (1, 16), "length": (1, 256)}


def test_shapes() -> None:
    assert shape_of(BIAS, {"batch": 2, "sequence": 3, "length": 4}) == (2, 1, 3, 4)
    assert shape_of(BIAS, {"batch": 2}) == (2, 1, -1, -1)


def told(embeds: tuple[int, ...], bias: tuple[int, ...]) -> Sizes:
    sizes = Sizes("decoder.onnx", INPUTS, PROFILE)
    sizes.tell("inputs_embeds", embeds)
    sizes.tell("attention_bias", bias)
    return sizes


def test_what_shapes_say() -> None:
    sizes = told((1, 2, 8), (1, 1, 2, 9))
    assert sizes.read() == {"batch": 1, "sequence": 2, "length": 9}
    sizes.tell("attention_bias", (1, 1, 2, 10))
    assert sizes.read() == {"batch": 1, "sequence": 2, "length": 10}
    sizes.tell("inputs_embeds", (1, 3, 8))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"attention_bias is \[1, 1, 2, 10\], the sequence of other inputs 3"):
            sizes.read()


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 2), (1, 2, 8, 1)])
def test_shapes_that_are_not_the_graphs(shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="its engine takes"):
        told(shape, (1, 1, 2, 9)).read()


def test_a_bias_over_more_than_it_was_made_for() -> None:
    value = np.arange(1, 11, dtype=np.float32).reshape(1, 1, 2, 5)
    slot = np.zeros((1, 1, 4, 8), np.float32)
    _write("attention_bias", value, slot, None)
    assert np.array_equal(slot[0, 0, :2, :5], value[0, 0])
    assert (slot[0, 0, 2:] == HIDDEN).all()
    assert (slot[0, 0, :, 5:] == HIDDEN).all()
    _write("attention_bias.1", value, slot, 4)  # a past of 3, rounded up to 4
    assert np.array_equal(slot[0, 0, :2, :3], value[0, 0, :, :3])
    assert np.array_equal(slot[0, 0, :2, 4:6], value[0, 0, :, 3:])
    assert (slot[0, 0, :2, [3, 6, 7]] == HIDDEN).all()
    assert (slot[0, 0, 2:] == HIDDEN).all()
    _write("cos", np.ones((1, 1, 2, 5), np.float32), slot, 4)
    assert slot.sum() == 10
