"""The cache by itself, and what the decoder makes of it."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import ContextError
from mllm_edge.runtime import generate
from mllm_edge.runtime.backend import open_backend
from mllm_edge.runtime.kv_cache import KVCache
from mllm_edge.runtime.sampling import Sampler, SamplingParams
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import CacheSpec

SPEC = CacheSpec(layers=2, heads=3, head_dim=8)


def new_cache(capacity: int = 16) -> KVCache:
    return KVCache(SPEC, open_backend("cpu"), capacity)


def test_bytes_and_names() -> None:
    cache = new_cache()
    assert cache.nbytes == 2 * 2 * 3 * 16 * 8 * 4
    inputs, outputs = cache.bindings()
    assert sorted(inputs) == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert sorted(outputs) == [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert all(inputs[f"past_key_values.{n}"] is outputs[f"present.{n}"] for n in ("0.key", "1.value"))


def test_advance_refuses_what_does_not_fit_and_changes_nothing() -> None:
    cache = new_cache(capacity=4)
    cache.advance(3)
    with pytest.raises(ContextError, match=r"3 \+ 2 tokens exceed the cache's capacity of 4"):
        cache.advance(2)
    assert cache.length == 3
    cache.advance(1)


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_checks_its_length(length: int) -> None:
    cache = new_cache()
    cache.advance(3)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(length)
    cache.truncate(1)
    assert cache.length == 1


def test_snapshot_longer_than_the_capacity() -> None:
    long = new_cache(16)
    long.advance(10)
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
    inputs, _ = cache.bindings()
    array = inputs["past_key_values.0.key"].array  # type: ignore[attr-defined]
    steps(vlm, [[5, 6, 7], [8]])
    written = np.abs(array).sum(axis=(0, 1, 3)) > 0
    assert written.tolist() == [True] * 4 + [False] * 28


def test_long_prompts_are_prefilled_in_chunks(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(5, 55)

    def tokens() -> list[int]:
        vlm.decoder.reset(128)
        sampler = Sampler(SamplingParams(), ids)
        return list(generate.generate(vlm.decoder, vlm.embed, vlm.embed(ids), sampler, (), 8, Trace()))

    whole = tokens()
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 7)
    assert tokens() == whole
    assert len(whole) == 8
