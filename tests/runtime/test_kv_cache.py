"""The cache by itself, and what the decoder makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.decode import generate
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.state import Cache
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import StateSpec

SPEC = (StateSpec("growing", (0, 1), (3, 8)),)
MODES: list[Any] = ["in_place", "append"]


class RecordingSession:
    """Keeps what a cache binds."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.binds = 0

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self.binds += 1

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("a cache runs nothing")


@pytest.fixture
def session() -> RecordingSession:
    return RecordingSession()


def new_cache(capacity: int = 16, mode: Any = "in_place") -> Cache:
    return Cache(SPEC, open_backend("cpu"), capacity, mode)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_and_names(mode: Any, session: RecordingSession) -> None:
    cache = new_cache(mode=mode)
    assert cache.nbytes == 2 * 2 * 3 * 16 * 8 * 4
    cache.advance(1, session)
    names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert sorted(session.inputs) == [f"past_key_values.{name}" for name in names]
    assert sorted(session.outputs) == [f"present.{name}" for name in names]


def test_in_place_binds_one_buffer_once(session: RecordingSession) -> None:
    cache = new_cache()
    cache.advance(3, session)
    cache.advance(1, session)
    assert session.binds == 1
    assert session.inputs["past_key_values.1.key"] is session.outputs["present.1.key"] is cache.buffer(1, "key")


def test_append_binds_a_prefix_and_the_rows_behind_it(session: RecordingSession) -> None:
    cache = new_cache(mode="append")
    whole = cache.buffer(1, "value").array  # type: ignore[attr-defined]
    cache.advance(3, session)
    cache.advance(2, session)
    past, new = session.inputs["past_key_values.1.value"].array, session.outputs["present.1.value"].array
    assert (past.shape, new.shape) == ((1, 3, 3, 8), (1, 2, 3, 8))
    new[...] = 7
    assert whole[0, :, 0, 0].tolist() == [0, 0, 0, 7, 7] + [0] * 11
    assert np.shares_memory(past, whole)


def test_append_advances_one_of_several_sequences(session: RecordingSession) -> None:
    cache = Cache(SPEC, open_backend("cpu"), 16, "append", batch=2)
    with pytest.raises(ValueError, match="one sequence at a time"):
        cache.advance([1, 1], session)
    cache.advance(3, session, row=1)
    cache.advance(2, session, row=1)
    past, new = session.inputs["past_key_values.0.key"].array, session.outputs["present.0.key"].array
    assert (past.shape, new.shape) == ((1, 3, 3, 8), (1, 2, 3, 8))
    new[...] = 7
    whole = cache.buffer(0, "key").array  # type: ignore[attr-defined]
    assert whole[1, :, 0, 0].tolist() == [0, 0, 0, 7, 7] + [0] * 11
    assert not whole[0].any()
    assert cache.lengths.tolist() == [0, 5]


def test_in_place_binds_all_sequences_or_one(session: RecordingSession) -> None:
    cache = Cache(SPEC, open_backend("cpu"), 16, batch=2)
    cache.advance([3, 1], session)
    assert session.inputs["past_key_values.1.key"] is cache.buffer(1, "key")
    cache.advance(2, session, row=1)
    assert session.inputs["past_key_values.1.key"].array.shape == (1, 3, 16, 8)
    assert cache.lengths.tolist() == [3, 3]
    cache.advance([1, 1], session)
    assert session.inputs["past_key_values.1.key"] is cache.buffer(1, "key")
    assert session.binds == 3


def test_lengths_of_several_sequences(session: RecordingSession) -> None:
    cache = Cache(SPEC, open_backend("cpu"), 8, batch=2)
    cache.advance([5, 2], session)
    snapshot = cache.snapshot()
    assert (snapshot.lengths, snapshot.length) == ((5, 2), 5)
    with pytest.raises(ContextError, match=r"5 \+ 4 tokens"):
        cache.advance([4, 1], session)
    cache.truncate([4, 2])
    with pytest.raises(ValueError, match=r"length \[4, 2\] to \[3, 3\]"):
        cache.truncate(3)
    cache.restore(snapshot)
    assert cache.lengths.tolist() == [5, 2]
    with pytest.raises(ValueError, match="snapshot of 2 sequences"):
        new_cache().restore(snapshot)


def test_advance_refuses_what_does_not_fit_and_changes_nothing(session: RecordingSession) -> None:
    cache = new_cache(capacity=4)
    cache.advance(3, session)
    with pytest.raises(ContextError, match=r"3 \+ 2 tokens exceed the cache's capacity of 4"):
        cache.advance(2, session)
    assert cache.length == 3
    cache.advance(1, session)


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_checks_its_length(length: int, session: RecordingSession) -> None:
    cache = new_cache()
    cache.advance(3, session)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(length)
    cache.truncate(1)
    assert cache.length == 1


@pytest.mark.parametrize("mode", MODES)
def test_snapshot_holds_the_tokens_only(mode: Any, session: RecordingSession) -> None:
    cache = new_cache(mode=mode)
    cache.advance(5, session)
    cache.buffer(0, "key").array[...] = 3  # type: ignore[attr-defined]
    snapshot = cache.snapshot()
    assert snapshot.length == 5
    assert all(rows.size == 5 * 3 * 8 for rows in snapshot.rows)
    other = new_cache(capacity=8, mode=mode)
    other.restore(snapshot)
    assert other.length == 5
    assert other.buffer(0, "key").array.sum() == 3 * 5 * 3 * 8  # type: ignore[attr-defined]


def test_snapshot_longer_than_the_capacity(session: RecordingSession) -> None:
    long = new_cache(16)
    long.advance(10, session)
    with pytest.raises(ContextError, match="snapshot of 10 tokens"):
        new_cache(8).restore(long.snapshot())


@pytest.fixture
def vlm(tiny_bundle: Path) -> VLM:
    return VLM.load(tiny_bundle)


def steps(vlm: VLM, pieces: list[list[int]]) -> np.ndarray:
    """Feed token ids piece by piece; the logits after the last piece."""
    logits = np.zeros(0)
    for piece in pieces:
        logits = vlm.decoder.forward(vlm.embed(np.array(piece))).copy()
    return logits


def test_chunks_and_single_tokens_give_the_logits_of_one_prefill(vlm: VLM) -> None:
    vlm.decoder.reset(64)
    whole = steps(vlm, [[5, 6, 7, 8, 9, 10]])
    for pieces in ([[5, 6, 7], [8, 9, 10]], [[5], [6], [7], [8], [9], [10]], [[5, 6], [7], [8, 9], [10]]):
        vlm.decoder.reset(64)
        np.testing.assert_allclose(steps(vlm, pieces), whole, atol=1e-5)


def test_truncate_then_continue_equals_never_having_gone_there(vlm: VLM) -> None:
    cache = vlm.decoder.reset(64)
    steps(vlm, [[5, 6, 7], [200, 201, 202, 203]])
    cache.truncate(3)
    continued = steps(vlm, [[8, 9]])
    vlm.decoder.reset(64)
    np.testing.assert_allclose(continued, steps(vlm, [[5, 6, 7, 8, 9]]), atol=1e-5)


def test_restored_snapshot_continues_alike(vlm: VLM) -> None:
    cache = vlm.decoder.reset(64)
    steps(vlm, [[5, 6, 7]])
    snapshot = cache.snapshot()
    first = steps(vlm, [[8, 9]])
    cache = vlm.decoder.reset(64)
    steps(vlm, [[100, 101, 102, 103, 104, 105]])
    cache.restore(snapshot)
    assert cache.length == 3
    np.testing.assert_array_equal(steps(vlm, [[8, 9]]), first)


def test_larger_capacity_replaces_the_buffers_and_keeps_the_result(vlm: VLM) -> None:
    small = vlm.decoder.reset(8)
    first = steps(vlm, [[5, 6, 7]])
    assert vlm.decoder.reset(4) is small
    large = vlm.decoder.reset(512)
    assert large is not small
    assert large.capacity == 512
    np.testing.assert_allclose(steps(vlm, [[5, 6, 7]]), first, atol=1e-6)


def test_decode_does_not_copy_the_cache(vlm: VLM) -> None:
    cache = vlm.decoder.reset(32)
    array = cache.buffer(0, "key").array  # type: ignore[attr-defined]
    steps(vlm, [[5, 6, 7], [8]])
    written = np.abs(array).sum(axis=(0, 1, 3)) > 0
    assert written.tolist() == [True] * 4 + [False] * 28


def test_long_prompts_are_prefilled_in_chunks(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(5, 55)

    def tokens() -> list[int]:
        vlm.decoder.reset(128)
        sampler = Sampler(SamplingParams(), ids)
        return list(generate.generate(vlm.decoder, vlm.embed, Encoded(vlm.embed(ids)), sampler, (), 8, Trace()))

    whole = tokens()
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 7)
    assert tokens() == whole
    assert len(whole) == 8


@pytest.mark.parametrize(
    ("tokens", "deepest"), [(2048, 1024), (1500, 512), (1537, 512), (3008, 1984), (700, 64), (5, 0)]
)
def test_long_pieces_begin_where_an_engine_has_room_behind_them(tokens: int, deepest: int) -> None:
    pieces = list(generate.chunks(tokens, 1024, None, deepest))
    assert [token for piece in pieces for token in range(tokens)[piece]] == list(range(tokens))
    assert all(piece.stop - piece.start <= 1024 for piece in pieces)
    assert all(piece.start <= deepest or piece.stop - piece.start <= 16 for piece in pieces)
    if tokens - deepest <= 1024:
        assert len(pieces) == -(-tokens // 1024), "no more of them than are needed"


def test_a_prompt_behind_much_comes_in_short_pieces() -> None:
    """Behind 1,100 tokens of a context of 2,048, say."""
    pieces = list(generate.chunks(40, 1024, None, 1024 - 1100))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 16), (16, 32), (32, 40)]
    assert [piece.stop for piece in generate.chunks(40, 16)] == [16, 32, 40]
