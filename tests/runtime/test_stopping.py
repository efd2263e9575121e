"""Calls that are cancelled or run out of time, how a model fares, and the same calls awaited."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM, Cancel
from mllm_edge.errors import CancelledError, ClosedError, OptionError, PromptError, TimedOutError
from mllm_edge.runtime import stopping
from mllm_edge.runtime.asynchronous import AsyncVLM
from mllm_edge.runtime.decode import generate
from mllm_edge.runtime.trace import Trace
from tests.runtime.hook import Hook

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
LONG = 60  # seconds, after which a test that waits has failed


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[VLM]:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        yield vlm


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What timeouts go by; `now` in seconds."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stopping, "time", clock)
    return clock


def ask(vlm: VLM, **options: Any) -> Any:
    return vlm.generate("What is it?", IMAGE, max_new_tokens=6, ignore_eos=True, **options)


# ---------------------------------------------------------------- cancel
@pytest.mark.parametrize(
    ("stage", "next_one"), [("vision_encoder", "connector"), ("connector", "prefill"), ("prefill", "decode")]
)
def test_a_cancelled_call_ends_before_its_next_run(vlm: VLM, stage: str, next_one: str) -> None:
    expected, cancel = ask(vlm).token_ids, Cancel()
    trace = Hook(stage, cancel.cancel)
    with pytest.raises(CancelledError) as caught:
        ask(vlm, cancel=cancel, trace=trace)
    assert caught.value.fix
    assert (trace.runs(stage), trace.runs(next_one)) == (1, 0)
    assert ask(vlm).token_ids == expected


def test_pieces_that_came_before_the_cancel_stay(vlm: VLM) -> None:
    expected, cancel, pieces = ask(vlm), Cancel(), list[int]()
    stream = vlm.stream("What is it?", IMAGE, max_new_tokens=6, ignore_eos=True, cancel=cancel)
    pieces += next(stream).token_ids
    cancel.cancel()
    with pytest.raises(CancelledError):
        next(stream)
    assert pieces
    assert tuple(pieces) == expected.token_ids[: len(pieces)]
    assert len(pieces) < 6
    assert ask(vlm).token_ids == expected.token_ids


def test_a_long_prompt_is_cancelled_between_its_pieces_and_goes_on_from_there(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 8)
    expected, cancel = ask(vlm, reuse=True), Cancel()
    vlm.generate("Another one.", max_new_tokens=1, reuse=True)
    trace = Hook("prefill", cancel.cancel, 3)
    with pytest.raises(CancelledError):
        vlm.generate("Something else entirely, and long enough for pieces.", IMAGE, cancel=cancel, trace=trace)
    assert trace.runs("prefill") == 3
    again = ask(vlm, reuse=True)
    assert again.token_ids == expected.token_ids
    cancel = Cancel()
    with pytest.raises(CancelledError):
        ask(vlm, cancel=cancel, trace=Hook("decode", cancel.cancel, 2), reuse=True)
    assert ask(vlm, reuse=True).token_ids == expected.token_ids


def test_a_cancel_that_came_before_the_call_ends_it_at_once(vlm: VLM) -> None:
    cancel, trace = Cancel(), Trace()
    assert not cancel.cancelled
    cancel.cancel()
    cancel.cancel()
    assert cancel.cancelled
    assert "cancelled" in repr(cancel)
    for call in (
        lambda: ask(vlm, cancel=cancel, trace=trace),
        lambda: vlm.score_answers("Is it?", IMAGE, answers=["Yes"], cancel=cancel),
        lambda: vlm.encode_image(IMAGE, cancel=cancel),
    ):
        with pytest.raises(CancelledError):
            call()
    assert trace.runs("vision_encoder") == 0


def test_a_call_that_waits_is_cancelled_and_the_next_has_its_turn(vlm: VLM) -> None:
    expected, cancel = ask(vlm).token_ids, Cancel()
    stream = vlm.stream("Tell me.", max_new_tokens=50, ignore_eos=True)
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(lambda: ask(vlm, cancel=cancel))
        while vlm.health().waiting < 1:
            pass
        behind = pool.submit(lambda: ask(vlm).token_ids)
        cancel.cancel()
        with pytest.raises(CancelledError):
            waiting.result(LONG)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert behind.result(LONG) == expected


def test_one_cancel_ends_several_calls(tiny_bundle: Path) -> None:
    cancel, both = Cancel(), threading.Barrier(2, timeout=LONG)
    with (
        VLM.load(tiny_bundle, threads=1) as one,
        VLM.load(tiny_bundle, threads=1) as two,
        ThreadPoolExecutor(2) as pool,
    ):

        def work(vlm: VLM) -> None:
            def act() -> None:
                both.wait()
                cancel.cancel()

            ask(vlm, cancel=cancel, trace=Hook("decode", act))

        futures = [pool.submit(work, vlm) for vlm in (one, two)]
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(LONG)


@pytest.mark.parametrize(
    ("options", "words"), [({"cancel": True}, "cancel"), ({"timeout": 0}, "timeout"), ({"timeout": "1"}, "timeout")]
)
def test_what_ends_no_call_is_refused(vlm: VLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ask(vlm, **options)
    with pytest.raises(OptionError, match=words):
        vlm.encode_image(IMAGE, **options)


# ---------------------------------------------------------------- timeout
def test_an_answer_is_as_long_as_its_time(vlm: VLM, clock: SimpleNamespace) -> None:
    expected = ask(vlm)

    def later() -> None:
        clock.now += 20

    in_time = ask(vlm, timeout=10, trace=Hook("decode", lambda: None))
    assert (in_time.token_ids, in_time.finish_reason) == (expected.token_ids, "length")
    late = ask(vlm, timeout=10, trace=Hook("decode", later, 3))
    assert late.finish_reason == "timeout"
    assert late.token_ids == expected.token_ids[:4]
    assert expected.text.startswith(late.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert late.metrics.new_tokens == 4
    assert ask(vlm).token_ids == expected.token_ids


@pytest.mark.parametrize("stage", ["preprocess", "vision_encoder", "embed"])
def test_a_timeout_before_the_first_token_is_an_empty_answer(vlm: VLM, clock: SimpleNamespace, stage: str) -> None:
    def later() -> None:
        clock.now += 20

    chunks = list(vlm.stream("What is it?", IMAGE, timeout=10, trace=Hook(stage, later)))
    (result,) = [chunk.result for chunk in chunks]
    assert result is not None
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "timeout")
    assert result.metrics.new_tokens == 0


def test_waiting_for_others_takes_of_the_time(vlm: VLM) -> None:
    stream = vlm.stream("Tell me.", max_new_tokens=50, ignore_eos=True)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: ask(vlm, timeout=1e-6)).result(LONG).finish_reason == "timeout"
        with pytest.raises(TimedOutError):
            pool.submit(lambda: vlm.encode_image(IMAGE, timeout=1e-6)).result(LONG)
    assert next(stream)


def test_scores_and_features_have_no_part_to_show(vlm: VLM, clock: SimpleNamespace) -> None:
    def later() -> None:
        clock.now += 20

    with pytest.raises(TimedOutError) as caught:
        vlm.score_answers("Is it?", IMAGE, answers=["Yes"], timeout=10, trace=Hook("vision_encoder", later))
    assert isinstance(caught.value, TimeoutError)
    assert "timeout" in caught.value.fix
    with pytest.raises(TimedOutError):
        vlm.encode_image(IMAGE, timeout=10, trace=Hook("vision_encoder", later))


def test_a_conversation_goes_on_behind_an_answer_that_was_cut(vlm: VLM, clock: SimpleNamespace) -> None:
    def later() -> None:
        clock.now += 20

    chat, cancel = vlm.chat(), Cancel()
    options: Any = {"max_new_tokens": 6, "ignore_eos": True}
    said = "".join(c.text for c in chat.ask("And?", timeout=10, trace=Hook("decode", later, 3), **options))
    assert chat.messages()[-1]["content"] == said.strip()
    with pytest.raises(CancelledError):
        list(chat.ask("More?", cancel=cancel, trace=Hook("allocate", cancel.cancel), **options))
    assert chat.turns == 1
    text = "".join(c.text for c in chat.ask("More?", **options))
    fresh = [*chat.messages()[:2], {"role": "user", "content": "More?"}]
    assert text == vlm.generate(fresh, **options).text


# ---------------------------------------------------------------- how it fares
def test_a_model_tells_how_it_fares(tiny_bundle: Path) -> None:
    vlm, cancel = VLM.load(tiny_bundle, threads=1), Cancel()
    first = vlm.health()
    assert (first.state, first.waiting, first.running, first.done) == ("ready", 0, 0, 0)
    warm = vlm.warm_up((50, 90))
    assert len(warm.token_ids) == 2
    assert warm.metrics.image_tokens > 0
    stream = vlm.stream("Tell me.", max_new_tokens=9, ignore_eos=True)
    next(stream)
    busy = vlm.health()
    assert (busy.state, busy.done) == ("busy", 1)
    assert busy.running > 0
    stream.close()  # type: ignore[attr-defined]
    for _ in range(2):  # the second never has its turn
        with pytest.raises(CancelledError):
            ask(vlm, cancel=cancel, trace=Hook("decode", cancel.cancel))

    class Broken(Exception):
        pass

    def fail() -> None:
        raise Broken("of itself")

    with pytest.raises(Broken):
        ask(vlm, trace=Hook("decode", fail))
    with pytest.raises(PromptError):  # never had its turn
        vlm.generate([], IMAGE)
    found = vlm.health()
    assert (found.state, found.done, found.stopped, found.failed) == ("ready", 1, 2, 1)
    assert found.last_error == "Broken: of itself"
    assert found.resident > 0
    vlm.close()
    assert vlm.health().state == "closed"


# ---------------------------------------------------------------- awaited
def test_awaited_calls_give_what_plain_ones_do(vlm: VLM) -> None:
    async def all_of_them() -> tuple[Any, ...]:
        model = AsyncVLM(vlm)
        chat = model.chat()
        image = await model.encode_image(IMAGE)
        result = await model.generate("What is it?", image, max_new_tokens=6, ignore_eos=True)
        pieces = [c.text async for c in model.stream("What is it?", IMAGE, max_new_tokens=6, ignore_eos=True)]
        scores = await model.score_answers("Is it?", IMAGE, answers=["Yes", "No"])
        said = [c.text async for c in chat.ask("And?", max_new_tokens=6)]
        return result, "".join(pieces), scores, "".join(said), chat.conversation.turns

    result, pieces, scores, said, turns = asyncio.run(all_of_them())
    assert result.token_ids == ask(vlm).token_ids
    assert pieces == result.text
    assert scores == vlm.score_answers("Is it?", IMAGE, answers=["Yes", "No"])
    assert said == vlm.generate([{"role": "user", "content": "And?"}], max_new_tokens=6).text
    assert turns == 1


def test_tasks_have_their_turns_and_errors_come_to_them(vlm: VLM) -> None:
    expected = [vlm.generate(f"Question {i}", max_new_tokens=6).text for i in range(4)]

    async def together() -> list[Any]:
        model = AsyncVLM(vlm)

        async def read(i: int) -> str:
            return "".join([c.text async for c in model.stream(f"Question {i}", max_new_tokens=6)])

        return await asyncio.gather(*map(read, range(4)), model.generate([]), return_exceptions=True)

    *texts, error = asyncio.run(together())
    assert texts == expected
    assert isinstance(error, PromptError)


def _cancelled_within(vlm: VLM, of: Callable[[AsyncVLM, Trace], Coroutine[Any, Any, Any]], stage: str) -> Trace:
    """Cancel the task of a call while `stage` runs; its trace."""

    async def main() -> Trace:
        loop, told = asyncio.get_running_loop(), threading.Event()

        def stop() -> None:
            task.cancel()
            loop.call_soon(told.set)  # behind what the cancelled task does

        def act() -> None:
            loop.call_soon_threadsafe(stop)
            assert told.wait(LONG)

        trace = Hook(stage, act)
        task = asyncio.ensure_future(of(AsyncVLM(vlm), trace))
        with pytest.raises(asyncio.CancelledError):
            await task
        return trace

    return asyncio.run(main())


@pytest.mark.parametrize("stage", ["vision_encoder", "prefill", "decode"])
def test_a_cancelled_task_ends_its_call(vlm: VLM, stage: str) -> None:
    expected = ask(vlm).token_ids

    async def whole(model: AsyncVLM, trace: Trace) -> Any:
        return await model.generate("What is it?", IMAGE, max_new_tokens=6, ignore_eos=True, trace=trace)

    async def pieces(model: AsyncVLM, trace: Trace) -> Any:
        stream = model.stream("What is it?", IMAGE, max_new_tokens=6, ignore_eos=True, trace=trace)
        return [chunk async for chunk in stream]

    for of in (whole, pieces):
        trace = _cancelled_within(vlm, of, stage)
        assert trace.runs(stage) == 1
        assert vlm.health().state == "ready"
        assert ask(vlm).token_ids == expected


def test_an_answer_that_a_task_leaves_half_taken_lets_others_go_on(vlm: VLM) -> None:
    async def leave() -> str:
        model = AsyncVLM(vlm)
        stream = model.stream("What is it?", max_new_tokens=50, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()
        return (await model.generate("Hi", max_new_tokens=4)).text

    assert asyncio.run(leave()) == vlm.generate("Hi", max_new_tokens=4).text


def test_an_awaited_model_is_opened_and_closed(tiny_bundle: Path) -> None:
    async def session() -> AsyncVLM:
        async with await AsyncVLM.load(tiny_bundle, threads=1) as model:
            await model.generate("Hi", max_new_tokens=1)
        return model

    model = asyncio.run(session())
    with pytest.raises(ClosedError):
        model.vlm.generate("Hi")
