"""A cache that begins small and grows: the same logits and tokens, in less memory where answers are short."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.state import Cache
from mllm_edge.runtime.limits import CAPACITY_STEP
from mllm_edge.spec import StateSpec

TARGETS = ("cpu", "tensorrt", "tensorrt-10.3")  # two forms in place, one that appends
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


class Rigid(OnnxRuntimeCpu):
    """Allocates all at once."""

    grows = False


# One with positions on three axes, one with state that does not grow.
@pytest.fixture(params=[pytest.param(f, marks=pytest.mark.xdist_group(f"bundle-{f}")) for f in ("qwen2_vl", "lfm2_vl")])
def bundle(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Bundle:
    return Bundle.load(floats(request.param))


@pytest.mark.parametrize("target", TARGETS)
def test_logits_and_tokens_are_the_same(bundle: Bundle, target: str) -> None:
    rows, found, sizes = [], [], []
    for backend in (OnnxRuntimeCpu(target=target), Rigid(target=target)):
        with VLM(bundle, backend) as vlm:
            prompt = vlm.encode(vlm.processor.process("What?", IMAGE))
            rows.append(vlm.steps(prompt, np.arange(3, 303)))
            assert vlm.decoder.cache is not None
            sizes.append(vlm.decoder.cache.capacity)
            found.append(vlm.generate("What?", IMAGE, max_new_tokens=600, ignore_eos=True).token_ids)
    np.testing.assert_array_equal(*rows)
    assert found[0] == found[1]
    assert len(found[0]) == 600
    assert len(prompt) + 300 > 2 * CAPACITY_STEP - 200, "it has grown"
    assert sizes[1] == len(prompt) + 300


def test_a_short_answer_takes_little(bundle: Bundle) -> None:
    with VLM(bundle, OnnxRuntimeCpu()) as vlm, VLM(bundle, Rigid()) as rigid:
        sizes = []
        for model in (vlm, rigid):
            for _, _ in zip(range(5), model.stream("What?", IMAGE, max_new_tokens=900, ignore_eos=True), strict=False):
                pass
            assert model.decoder.cache is not None
            sizes.append(model.decoder.cache.capacity)
        assert sizes[0] <= 2 * CAPACITY_STEP < sizes[1]
        before = vlm.generate("Hi", max_new_tokens=4, ignore_eos=True)
        assert before.token_ids == rigid.generate("Hi", max_new_tokens=4, ignore_eos=True).token_ids


def test_a_conversation_grows_with_its_answers(bundle: Bundle) -> None:
    with VLM(bundle, OnnxRuntimeCpu()) as vlm:
        chat = vlm.chat()
        for question in ("One?", "Two?"):
            *_, last = chat.ask(question, max_new_tokens=280, ignore_eos=True)
        assert last.result is not None
        assert last.result.metrics.reused > 0
        fresh = vlm.generate(chat.messages()[:-1], max_new_tokens=280, ignore_eos=True)
        assert last.result.token_ids == fresh.token_ids


def test_it_grows_no_further_than_it_may(bundle: Bundle) -> None:
    with VLM(bundle, OnnxRuntimeCpu()) as vlm:
        decoder, row = vlm.decoder, vlm.embed(np.array([5]))
        decoder.start(vlm.encode(vlm.processor.process("Hi")), 700)
        decoder.forward(np.repeat(row, 600, axis=0))
        assert decoder.cache is not None
        held = decoder.cache.capacity
        with pytest.raises(ContextError):
            decoder.forward(np.repeat(row, 600, axis=0))
        assert (decoder.cache.capacity, decoder.cache.length) == (held, 600)
        decoder.reset(CAPACITY_STEP)
        with pytest.raises(ContextError):
            decoder.forward(np.repeat(row, held + 1, axis=0))


def test_a_cache_that_could_not_grow_is_forgotten(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with VLM(bundle, OnnxRuntimeCpu()) as vlm:
        expected = vlm.generate("What?", max_new_tokens=4, ignore_eos=True).token_ids
        vlm.decoder.forget()
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "grow", _no_memory)
            with pytest.raises(MemoryError):
                vlm.generate("What?", max_new_tokens=700, ignore_eos=True)
        assert vlm.decoder.cache is None
        assert vlm.generate("What?", max_new_tokens=4, ignore_eos=True).token_ids == expected


@pytest.mark.parametrize("mode", ["in_place", "append"])
def test_what_is_held_is_copied(mode: Any) -> None:
    bound: list[Any] = []

    class Session:
        def bind(self, inputs: Any, outputs: Any) -> None:
            bound.append((inputs, outputs))

    cache, session = Cache((StateSpec("growing", (0, 1), (3, 8)),), OnnxRuntimeCpu(), 4, mode), Session()
    axis = 2 if mode == "in_place" else 1
    cache.advance(3, session)  # type: ignore[arg-type]
    rows = np.random.default_rng(0).random((1, 3, 3, 8), dtype=np.float32)
    cache.buffer(1, "value").write(axis, rows)
    cache.grow(10, session)  # type: ignore[arg-type]
    np.testing.assert_array_equal(cache.buffer(1, "value").read(axis, 3), rows)
    assert (cache.capacity, cache.length) == (10, 3)
    cache.advance(7, session)  # type: ignore[arg-type]
    assert set(bound[-1][0]) == {f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")}
    assert cache.nbytes == 2 * 2 * 3 * 10 * 8 * 4


def test_large_buffers_are_zeros_of_their_own() -> None:
    backend = OnnxRuntimeCpu()
    for shape in ((1, 2, 8), (1, 2, 1 << 16, 8), (1, 1, 0, 8)):
        buffer = backend.allocate(shape, "float32")
        assert buffer.nbytes == 4 * int(np.prod(shape))
        assert not buffer.read(0, 1).any()
        buffer.write(0, np.ones(shape, np.float32))
        assert buffer.read(0, 1).all()


def _no_memory(*_: Any) -> None:
    raise MemoryError("none left")
