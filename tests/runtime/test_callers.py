"""Several callers of one model, and callers that go away, fail, or find it closed."""

import gc
import linecache
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import BusyError, ClosedError, GivenUpError, MllmEdgeError
from mllm_edge.runtime import turns
from mllm_edge.runtime.conversation import Conversation
from mllm_edge.runtime.trace import Trace
from tests.runtime.hook import Hook

IMAGES = [np.random.default_rng(i).integers(0, 256, (50, 90, 3), dtype=np.uint8) for i in range(4)]
LONG = 60  # seconds, after which a test that waits has failed


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[VLM]:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        yield vlm


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released whenever a call has its place in the queue and is about to wait for its turn."""
    told = threading.Semaphore(0)
    plain = turns._gate

    class Gate:
        def __init__(self) -> None:
            self._lock = plain()
            self.release = self._lock.release

        def acquire(self, timeout: float = -1) -> bool:
            told.release()
            return self._lock.acquire(timeout=timeout)

    monkeypatch.setattr(turns, "_gate", Gate)
    return told


@contextmanager
def call(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """`work` in a thread; yields what waits for its result or raises its error."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        yield lambda: future.result(LONG)


def ask(vlm: VLM, i: int = 0, **options: Any) -> tuple[int, ...]:
    return vlm.generate(f"Question {i}", IMAGES[i % 4], max_new_tokens=6, **options).token_ids


def begun(vlm: VLM) -> Iterator[Any]:
    """An answer with one piece taken."""
    stream = vlm.stream("Tell me.", max_new_tokens=200, ignore_eos=True)
    next(stream)
    return stream


# ---------------------------------------------------------------- turns
def test_four_threads_get_their_own_answers(vlm: VLM) -> None:
    expected = [ask(vlm, i) for i in range(8)]
    assert len(set(expected)) > 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: ask(vlm, n % 8), range(80)))
    assert found == [expected[n % 8] for n in range(80)]


def test_pieces_that_threads_take_by_turns_are_their_own(vlm: VLM) -> None:
    expected = [vlm.generate(f"Question {i}", max_new_tokens=12).text for i in range(4)]
    barrier = threading.Barrier(4)

    def read(i: int) -> str:
        barrier.wait(LONG)
        return "".join(chunk.text for chunk in vlm.stream(f"Question {i}", max_new_tokens=12))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == expected


def test_eight_callers_are_served_in_the_order_of_their_arrival(vlm: VLM, queued: threading.Semaphore) -> None:
    stream, served = begun(vlm), list[int]()
    assert queued.acquire(timeout=LONG)

    def work(i: int) -> None:
        vlm.generate("Hi", max_new_tokens=1, trace=Hook("prefill", lambda: served.append(i)))

    order = random.Random(0).sample(range(8), 8)
    with ThreadPoolExecutor(8) as pool:
        futures = []
        for i in order:
            futures.append(pool.submit(work, i))
            assert queued.acquire(timeout=LONG)
        assert served == []
        stream.close()  # type: ignore[attr-defined]
        for future in futures:
            future.result(LONG)
    assert served == order


@pytest.mark.parametrize("how", ["close", "drop", "collect", "break", "error", "finish", "last piece"])
def test_a_caller_that_leaves_passes_its_turn_on(vlm: VLM, queued: threading.Semaphore, how: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}

    def leave() -> Any:
        stream = vlm.stream("Tell me.", **options)
        next(stream)
        assert queued.acquire(timeout=LONG)
        started.set()
        assert queued.acquire(timeout=LONG)  # the other one waits
        if how == "close":
            stream.close()  # type: ignore[attr-defined]
        elif how == "collect":
            circle: list[Any] = [stream]
            circle.append(circle)
            del stream, circle
            gc.collect()
        elif how == "break":
            for _ in stream:
                break
        elif how == "error":
            raise KeyError("of the consumer's own")
        elif how == "finish":
            list(stream)
        elif how == "last piece":
            while next(stream).result is None:
                pass
            return stream
        return None

    started = threading.Event()
    with ThreadPoolExecutor(1) as leaving, ThreadPoolExecutor(1) as waiting:
        left = leaving.submit(leave)
        assert started.wait(LONG)
        answer = waiting.submit(ask, vlm)
        if how == "error":
            error = left.exception(LONG)
            assert isinstance(error, KeyError)
            error.__traceback__ = None  # which holds the stream
            del error
            left._exception = None
        else:
            left.result(LONG)
        assert answer.result(LONG) == ask(vlm)


def test_a_stream_that_nobody_takes_from_holds_nothing(vlm: VLM) -> None:
    stream = vlm.stream("Tell me.")
    with call(lambda: ask(vlm, wait=False)) as answer:
        assert answer()
    assert next(stream)


def test_an_error_passes_the_turn_on_and_the_next_answer_is_right(vlm: VLM) -> None:
    class Deadline(Exception):
        pass

    def fail() -> None:
        raise Deadline

    expected = ask(vlm)
    for stage in ("preprocess", "vision_encoder", "connector", "embed", "allocate", "prefill", "decode", "sample"):
        with pytest.raises(Deadline):
            vlm.generate("Tell me.", IMAGES[1], max_new_tokens=9, trace=Hook(stage, fail))
        with call(lambda: ask(vlm)) as answer:
            assert answer() == expected


@pytest.mark.parametrize(
    "part", ["turns.py", "vlm.py", "answer.py", "health.py", "decoder.py", "onnxruntime_cpu.py", "state.py"]
)
def test_an_exception_anywhere_leaves_a_model_that_answers_right(vlm: VLM, part: str) -> None:
    """As a signal's handler raises it, where a function begins or before a line."""

    class Deadline(Exception):
        pass

    expected, left = ask(vlm), 0
    # The interpreter visits the line of a `with` again when its body is left, and no signal is handled there.
    at = ("call",) if part == "turns.py" else ("call", "line")

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(part):
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event in at and not line.strip().startswith("with "):
            left -= 1
            if left == 0:
                raise Deadline
        return trace

    def stopped(after: int) -> bool:
        nonlocal left
        left = after
        sys.settrace(trace)
        try:
            vlm.generate("Question 1", IMAGES[1], max_new_tokens=3)
        except Deadline:
            return True
        finally:
            sys.settrace(None)
        return False

    after = 1
    while stopped(after):
        with call(lambda: ask(vlm, wait=False)) as answer:
            assert answer() == expected
        assert ask(vlm) == expected
        after += 1 + after // 4
    assert after > 10


def test_a_call_that_may_not_wait(vlm: VLM) -> None:
    with call(lambda: None):
        stream = begun(vlm)
        with call(lambda: ask(vlm, wait=False)) as answer, pytest.raises(BusyError, match="another call"):
            answer()
        with call(lambda: next(vlm.stream("Hi", wait=False))) as answer, pytest.raises(BusyError):
            answer()
        assert vlm.count_tokens("Hi") > 0
        list(stream)
    with call(lambda: ask(vlm, wait=False)) as answer:
        assert answer() == ask(vlm)


def test_a_second_call_of_a_thread_gives_its_unfinished_answer_up(vlm: VLM) -> None:
    expected = ask(vlm)
    for options in ({}, {"wait": False}):
        stream = begun(vlm)
        assert ask(vlm, **options) == expected
        with pytest.raises(GivenUpError, match="another call began"):
            next(stream)


def test_a_call_within_a_call_is_refused(vlm: VLM) -> None:
    refused: list[BaseException] = []

    def within() -> None:
        try:
            ask(vlm)
        except BusyError as error:
            refused.append(error)

    expected = ask(vlm, 1)
    assert ask(vlm, 1, trace=Hook("decode", within, 2)) == expected
    assert len(refused) == 1


def test_an_answer_may_wander_from_thread_to_thread(vlm: VLM) -> None:
    expected = vlm.generate("Hi", max_new_tokens=8).text
    stream, texts = vlm.stream("Hi", max_new_tokens=8), list[str]()
    while True:
        with call(lambda: next(stream, None)) as piece:
            found = piece()
        if found is None:
            break
        texts.append(found.text)
    assert "".join(texts) == expected


def test_features_and_components_wait_too(vlm: VLM, queued: threading.Semaphore) -> None:
    prompt = vlm.processor.process("Hi", IMAGES[0])
    expected = vlm.image_features(prompt)
    pixels = {"pixel_values": prompt.pixel_values}
    work: list[Callable[[], Any]] = [
        lambda: vlm.image_features(prompt),
        lambda: vlm.stage_outputs(prompt)["connector"]["image_features"],
        lambda: vlm.component("connector", vlm.component("vision_encoder", pixels))["image_features"],
        lambda: vlm.encode(prompt).embeds[prompt.image_positions],
    ]
    while queued.acquire(blocking=False):
        pass
    for task in work:
        stream = begun(vlm)
        assert queued.acquire(timeout=LONG)
        with call(task) as features:
            assert queued.acquire(timeout=LONG)
            stream.close()  # type: ignore[attr-defined]
            np.testing.assert_array_equal(features().reshape(expected.shape), expected)
        while queued.acquire(blocking=False):
            pass


def test_components_may_be_run_within_an_answer_of_ones_own(vlm: VLM) -> None:
    prompt = vlm.processor.process("Hi", IMAGES[0])
    expected, features = vlm.generate("Hi", max_new_tokens=8).text, vlm.image_features(prompt)
    texts = []
    for chunk in vlm.stream("Hi", max_new_tokens=8):
        np.testing.assert_array_equal(vlm.image_features(prompt), features)
        texts.append(chunk.text)
    assert "".join(texts) == expected


def test_waiting_and_the_consumer_are_told_apart(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.runtime import answer, trace

    now = 0.0

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now

    monkeypatch.setattr(answer, "time", Clock)
    monkeypatch.setattr(trace, "time", Clock)
    stream = vlm.stream("Tell me.", IMAGES[0], max_new_tokens=60, ignore_eos=True, trace=Trace(origin=0.0))
    now += 1000.0
    for chunk in stream:
        if chunk.result is not None:
            break
        now += 10.0
    metrics = chunk.result.metrics
    assert metrics.consumer == now > 1010.0
    assert (metrics.waited, metrics.ttft, metrics.total, metrics.tpot) == (0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------- close
def test_close_twice_and_calls_after_it(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle) as vlm:
        prompt = vlm.processor.process("Hi", IMAGES[0])
        chat, stream = Conversation(vlm), begun(vlm)
        vlm.close()
        vlm.close()
        for work in (
            lambda: ask(vlm),
            lambda: vlm.stream("Hi"),
            lambda: next(stream),
            lambda: vlm.count_tokens("Hi"),
            lambda: vlm.component("connector", {}),
            lambda: vlm.image_features(prompt),
            lambda: vlm.stage_outputs(prompt),
            lambda: vlm.encode(prompt),
            lambda: list(chat.ask("Hi")),
            lambda: vlm.decoder,
        ):
            with pytest.raises(ClosedError, match="was closed"):
                work()
        assert "closed" in repr(vlm)


def test_a_stream_made_before_the_close(tiny_bundle: Path) -> None:
    vlm = VLM.load(tiny_bundle)
    stream = vlm.stream("Hi")
    vlm.close()
    with pytest.raises(ClosedError):
        next(stream)


def test_close_ends_a_running_call_and_those_that_wait(tiny_bundle: Path, queued: threading.Semaphore) -> None:
    vlm = VLM.load(tiny_bundle)
    inside, go_on = threading.Event(), threading.Event()

    def block() -> None:
        inside.set()
        assert go_on.wait(LONG)

    def run() -> None:
        vlm.generate("Hi", max_new_tokens=100, ignore_eos=True, trace=Hook("decode", block, 3))

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(run)
        assert queued.acquire(timeout=LONG)
        assert inside.wait(LONG)
        waiting = pool.submit(ask, vlm)
        assert queued.acquire(timeout=LONG)
        closing = pool.submit(vlm.close)
        with pytest.raises(ClosedError):
            waiting.result(LONG)
        assert queued.acquire(timeout=LONG)  # close waits for the step that is under way
        assert not closing.done()
        go_on.set()
        with pytest.raises(ClosedError, match="was closed"):
            running.result(LONG)
        closing.result(LONG)
    assert not vlm._sessions


def test_close_from_within_a_call(tiny_bundle: Path) -> None:
    vlm = VLM.load(tiny_bundle)
    with pytest.raises(ClosedError):
        vlm.generate("Hi", max_new_tokens=9, ignore_eos=True, trace=Hook("decode", vlm.close, 2))
    assert not vlm._sessions


def test_a_model_that_is_dropped_goes_at_once(tiny_bundle: Path) -> None:
    import weakref

    vlm = VLM.load(tiny_bundle)
    list(vlm.stream("Hi", max_new_tokens=2))
    gone = weakref.ref(vlm)
    gc.disable()
    try:
        del vlm
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- the interpreter's end
_LEAVE = """
import numpy, sys, threading
from mllm_edge import VLM
from mllm_edge.runtime.trace import Trace

class Told(Trace):
    def span(self, name):
        if name == sys.argv[2]:
            begun.set()
        return super().span(name)

begun = threading.Event()
vlm = VLM.load(sys.argv[1], threads=2)
def work():
    while True:
        vlm.generate("Hi", images=[numpy.zeros((50, 90, 3), "uint8")], trace=Told())
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
begun.wait()
"""


@pytest.mark.parametrize("stage", ["preprocess", "vision_encoder", "prefill", "decode", "detokenize"])
def test_the_interpreter_ends_while_daemon_threads_generate(tiny_bundle: Path, stage: str) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", _LEAVE, str(tiny_bundle), stage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_have_their_place_and_a_fix() -> None:
    for error in (turns._busy(), turns._closed()):
        assert isinstance(error, MllmEdgeError)
        assert isinstance(error, RuntimeError)
        assert error.fix
