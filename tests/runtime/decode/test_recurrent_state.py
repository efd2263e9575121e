"""Recurrent state by itself: two buffers that take turns, zeros at the start, no way back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.state import Cache
from mllm_edge.spec import EmbeddingSpec, ModelSpec, PositionSpec, StateSpec, TensorSpec, Variant

STATE = (StateSpec("growing", (0,), (1, 4)), StateSpec("recurrent", (0,), (1, 1)))


class Counting:
    """A session whose recurrent state counts the tokens of each sequence; the run after `fails` was set fails."""

    limits: Mapping[str, int] = {}
    fails = False

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.shapes: list[tuple[int, ...]] = []

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.inputs |= inputs
        self.outputs |= outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.bind(feeds, {})
        past, present = self.inputs["past_conv.0"].array, self.outputs["present_conv.0"].array
        assert not np.shares_memory(past, present)
        present[...] = past + self.inputs["inputs_embeds"].shape[1]
        self.shapes.append(self.inputs["inputs_embeds"].shape)
        if self.fails:
            self.fails = False
            raise BackendError("a run failed", "try again")
        if "logits" in self.outputs:
            self.outputs["logits"][...] = present[:, :, :1]
        return {}


def new_decoder(dialect: Any = "opset24") -> tuple[Decoder, Counting]:
    mode: Any = "append" if dialect == "opset17" else "in_place"
    names = ["inputs_embeds", "attention_bias", *(name for spec in STATE for name in spec.inputs)]
    inputs = tuple(TensorSpec(name, "float32", ()) for name in names)
    model = ModelSpec("f", "t", 4, 3, 32, 0, EmbeddingSpec("", 3), PositionSpec("none"), STATE, None)
    variant = Variant("cpu", dialect, "float32", "d.onnx", inputs, (), mode)
    session = Counting()
    return Decoder(session, variant, model, open_backend("cpu")), session


def held(cache: Cache) -> list[float]:
    return cache.snapshot().recurrent[0].ravel().tolist()


def tokens(count: int) -> np.ndarray:
    return np.zeros((count, 4), np.float32)


def test_it_starts_with_zeros_and_each_run_goes_on() -> None:
    decoder, _ = new_decoder()
    for _ in range(2):
        cache = decoder.reset(32)
        assert held(cache) == [0]
        for count, total in ((5, 5), (1, 6), (1, 7), (3, 10)):
            decoder.forward(tokens(count))
            assert held(cache) == [total]


@pytest.mark.parametrize("dialect", ["opset24", "opset17"])
def test_a_failed_run_changes_nothing(dialect: str) -> None:
    decoder, session = new_decoder(dialect)
    cache = decoder.reset(32)
    decoder.forward(tokens(5))
    for _ in range(2):
        session.fails = True
        with pytest.raises(BackendError):
            decoder.forward(Encoded(tokens(2), np.array([9, 11])))
        assert (cache.length, held(cache)) == (5, [5])
        assert decoder.snapshot().shifts is None
    decoder.forward(tokens(1))
    assert (cache.length, held(cache)) == (6, [6])


def test_padding_does_not_get_into_it() -> None:
    decoder, session = new_decoder()
    cache = decoder.reset(32, batch=3)
    assert decoder.takes_batch([4, 4, 4])
    assert not decoder.takes_batch([4, 2, 4])
    decoder.forward_batch([tokens(n) for n in (4, 2, 5)])
    assert held(cache) == [4, 2, 5]
    decoder.forward_batch([tokens(3)] * 3)
    assert held(cache) == [7, 5, 8]
    assert session.shapes == [(1, 4, 4), (1, 2, 4), (1, 5, 4), (3, 3, 4)]
    session.fails = True
    with pytest.raises(BackendError):
        decoder.forward_batch([tokens(n) for n in (1, 2, 1)])
    decoder._step([Encoded(tokens(2))], None, None, sequence=1)
    decoder.forward_batch([tokens(1)] * 3)  # those that were run alone stand in another buffer than the rest
    assert held(cache) == [8, 8, 9]


def test_there_is_no_way_back_but_to_the_start() -> None:
    decoder, _ = new_decoder()
    cache = decoder.reset(32, batch=2)
    decoder.forward_batch([tokens(3)] * 2)
    snapshot = decoder.snapshot()
    for wanted in (1, [3, 2]):
        with pytest.raises(ValueError, match=r"length \[3, 3\] to .* no way back, only to the start"):
            cache.truncate(wanted)
    with pytest.raises(ValueError, match="cannot extend a cache with recurrent state"):
        cache.extend(1)
    cache.truncate([3, 0])
    assert (cache.lengths.tolist(), held(cache)) == ([3, 0], [3, 0])
    decoder.restore(snapshot)
    assert (cache.lengths.tolist(), held(cache)) == ([3, 3], [3, 3])
