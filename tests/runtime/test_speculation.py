"""Speculation: prompt lookup by itself, and answers that are the same with it as without, in fewer steps.

float32 graphs of every dialect on ONNX Runtime's CPU provider; logits of a token differ between the widths of a step by
rounding only, far below what decides between two tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.cli import options as cli_options
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.speculation import MOST_GUESSED, PromptLookup, check_speculation
from mllm_edge.runtime.trace import Metrics, Trace
from tests.families.parity import FLOAT32_TARGETS as TARGETS
from tests.families.row import families_of

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
# Text that a copy of itself continues.
TEXT = "abcabcabcabc, abcabcabcabc, abcabcabcabc"
# Of these the last are drawn from few tokens: some guesses come true, some do not.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    {"presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.1, "seed": 2, "top_k": 4},
]


class Known:
    """A guesser that knows the answer, and tells another token at a rate of `wrong`."""

    def __init__(self, answer: list[int], most: int, wrong: float = 0.0, vocabulary: int = 160):
        self._answer, self._most, self._wrong, self._vocabulary = answer, most, wrong, vocabulary
        self._random, self._at = np.random.default_rng(0), 0

    def guess(self, count: int) -> list[int]:
        truth = self._answer[self._at : self._at + min(count, self._most)]
        return [(t + 1) % self._vocabulary if self._random.random() < self._wrong else t for t in truth]

    def observe(self, token: int) -> None:
        self._at += 1


# ---------------------------------------------------------------- prompt lookup
def test_what_followed_the_last_tokens_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 2, 3], 4)
    assert lookup.guess(15) == [4, 5, 6, 7]
    assert PromptLookup([1, 2, 3, 4, 5, 6, 7, 2, 3], 4).guess(2) == [4, 5]
    assert PromptLookup([1, 2, 3, 4, 5, 6, 7, 2, 3], 4).guess(0) == []


def test_three_tokens_decide_before_two() -> None:
    assert PromptLookup([1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3], 1).guess(1) == [40]
    assert PromptLookup([9, 2, 3, 40, 8, 2, 3, 50, 1, 2, 3], 1).guess(1) == [50], "the most recent occurrence"


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 2], [1, 2, 3, 4], [5, 1, 6, 7, 1]])
def test_no_match_no_guess(ids: list[int]) -> None:
    """One token alone is none either."""
    assert PromptLookup(ids, 4).guess(4) == []


def test_a_loop_is_guessed_beyond_its_end() -> None:
    assert PromptLookup([7, 1, 2, 1, 2], 5).guess(5) == [1, 2, 1, 2, 1]
    assert PromptLookup([4, 4, 4], 3).guess(3) == [4, 4, 4]


def test_the_answer_is_looked_up_too() -> None:
    lookup = PromptLookup([1, 2], 3)
    for token in (5, 6, 7, 8, 1, 2, 5, 6):
        lookup.observe(token)
    assert lookup.guess(3) == [7, 8, 1]


def test_images_match_nothing_and_are_not_guessed() -> None:
    image = 99
    ids = [1, 2, image, image, image, 3, 4, 5, 1, 2]
    assert PromptLookup(ids, 4).guess(4) == [image, image, image, 3]
    assert PromptLookup(ids, 4, [2, 3, 4]).guess(4) == []
    later = [1, 2, 7, image, image, 1, 2]
    assert PromptLookup(later, 4, [3, 4]).guess(4) == [7], "cut before the image"
    assert PromptLookup([8, image, image, 5, image, image], 4, [1, 2, 4, 5]).guess(4) == []
    earlier = [1, 2, 6, 1, 2, image, 1, 2]
    assert PromptLookup(earlier, 1, [5]).guess(1) == [6], "the occurrence before an image tells nothing"


def test_guesses_grow_when_right_and_shrink_when_wrong() -> None:
    period = list(range(20))
    lookup, lengths = PromptLookup(period * 3, 8), []

    def step(right: int) -> None:
        """The next guess; so many of it come true, then what the loop does not say."""
        guess = lookup.guess(15)
        lengths.append(len(guess))
        for token in guess[:right]:
            lookup.observe(token)
        if right < len(guess):
            lookup.observe(100)
            for token in (0, 1, 2):
                lookup.observe(token)

    for right in (8, 8, 3, 3, 6, 0, 0, 1, 2, 4, 8):
        step(right)
    assert lengths == [8, 8, 8, 3, 6, 8, 1, 1, 2, 4, 8]


@pytest.mark.parametrize("count", [-1, 16, 2.5, "3"])
def test_range(count: Any, tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="speculation must be a whole number from 0 to 15, not"):
        check_speculation(count)
    with VLM.load(tiny_bundle) as vlm, pytest.raises(ValueError, match="speculation must be"):
        vlm.stream("Hi.", speculation=count)


def test_the_command_line_knows_the_range() -> None:
    assert cli_options._MOST_GUESSED == MOST_GUESSED


# ---------------------------------------------------------------- answers
@pytest.fixture(scope="module", params=families_of("speculation"))
def exported(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Path:
    return floats(request.param)


def answer(vlm: VLM, images: Any = (), **options: Any) -> tuple[tuple[Any, ...], Metrics]:
    """What must be equal, and the metrics."""
    result = vlm.generate(TEXT, images, **{"max_new_tokens": 48, **options})
    return (result.token_ids, result.text, result.finish_reason), result.metrics


@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_the_same(exported: Path, target: str) -> None:
    """Text alone and with images, however tokens are chosen; guesses come true, and do not."""
    accepted = rejected = 0
    with VLM(Bundle.load(exported), OnnxRuntimeCpu(1, target)) as vlm:
        for images in ((), [IMAGE]):
            for options in SETTINGS:
                expected, plain = answer(vlm, images, ignore_eos=True, **options)
                assert (plain.guessed, plain.accepted, plain.decode_steps) == (0, 0, 47)
                for speculation in (1, 3, 8, 15):
                    found, m = answer(vlm, images, ignore_eos=True, speculation=speculation, **options)
                    assert found == expected, (options, speculation)
                    assert m.decode_steps + m.accepted == m.new_tokens - 1
                    assert m.accepted <= m.guessed <= speculation * m.decode_steps
                    accepted, rejected = accepted + m.accepted, rejected + m.guessed - m.accepted
    assert accepted > 20
    assert rejected > 20


@pytest.mark.parametrize("speculation", [1, 3, 15])
def test_answers_end_alike(exported: Path, speculation: int) -> None:
    """By stop strings and stop ids wherever they come, by length, by the context."""
    with VLM.load(exported, threads=1, max_context=120) as vlm:
        free, _ = answer(vlm, ignore_eos=True)
        ids, text, _ = free
        for tokens in (1, 2, 3, 5, 1000):
            expected, _ = answer(vlm, max_new_tokens=tokens, ignore_eos=True)
            found, m = answer(vlm, max_new_tokens=tokens, ignore_eos=True, speculation=speculation)
            assert found == expected
            assert m.new_tokens == min(tokens, 120 - vlm.spec.begun(m.prompt_tokens))
        for end in sorted({text[i : i + 2] for i in range(4, len(text) - 1, 3)}):
            assert answer(vlm, stop=end, speculation=speculation)[0] == answer(vlm, stop=end)[0]
        for stop in sorted(set(ids)):
            vlm.stop_ids = frozenset([stop])
            found, _ = answer(vlm, speculation=speculation)
            assert found == answer(vlm)[0]
            assert found[0] == ids[: ids.index(stop)]
            assert found[2] == "stop"


def test_fewer_steps_on_text_that_repeats(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        # A penalty below 0 rewards what was said: the answer becomes a loop.
        options = {"max_new_tokens": 64, "ignore_eos": True, "frequency_penalty": -3.0}
        expected = vlm.generate(TEXT, **options)
        found = vlm.generate(TEXT, speculation=8, **options)
    assert found.token_ids == expected.token_ids
    assert found.metrics.decode_steps < 63 / 3
    assert found.metrics.as_dict()["decode_steps"] == found.metrics.decode_steps
    assert found.metrics.as_dict()["accepted"] == 63 - found.metrics.decode_steps
    assert len(found.metrics.token_seconds) == 63


# ---------------------------------------------------------------- the cache
def run(vlm: VLM, tokens: int, guesser: Any = None, trace: Trace | None = None, stops: Any = ()) -> list[int]:
    """Ids of an answer to the same prompt."""
    ids = np.array(vlm.tokenizer.encode(TEXT))
    vlm.decoder.reset(len(ids) + 64)
    sampler, embeds = Sampler(SamplingParams(), ids), Encoded(vlm.embed(ids))
    steps = generate(vlm.decoder, vlm.embed, embeds, sampler, stops, tokens, trace or Trace(), guesser=guesser)
    return list(steps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_the_cache_is_what_single_steps_make(exported: Path, target: str, wrong: float) -> None:
    with VLM(Bundle.load(exported), OnnxRuntimeCpu(1, target)) as vlm:
        answer = run(vlm, 40)
        assert vlm.decoder.cache is not None
        expected = vlm.decoder.cache.snapshot()
        trace = Trace()
        assert run(vlm, 40, Known(answer, 7, wrong, 320), trace) == answer
        found = vlm.decoder.cache.snapshot()
    assert found.lengths == expected.lengths
    for a, b in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    accepted, guessed = trace.counts["accepted"], trace.counts["guessed"]
    # 39 tokens behind the first, eight a step; at the end no more are guessed than are wanted.
    assert {0.0: accepted == guessed == 34, 0.3: 0 < accepted < guessed, 1.0: accepted == 0 < guessed}[wrong]
    assert trace.runs("decode") == 39 - accepted


@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_off_answer_leaves_what_single_steps_leave(exported: Path, target: str) -> None:
    """At every token, whether the generator is closed there or only looked at."""
    with VLM(Bundle.load(exported), OnnxRuntimeCpu(1, target)) as vlm:
        ids = np.array(vlm.tokenizer.encode(TEXT))
        answer = run(vlm, 24)
        for tokens in range(1, 24, 3):
            cache = vlm.decoder.reset(len(ids) + 64)
            steps = generate(
                *(vlm.decoder, vlm.embed, Encoded(vlm.embed(ids)), Sampler(SamplingParams()), (), 24, Trace()),
                guesser=Known(answer, 5, 0.2, 320),
            )
            for produced in range(tokens):
                assert next(steps) == answer[produced]
                assert cache.length == len(ids) + produced
            steps.close()
            assert cache.length == len(ids) + tokens - 1
            going_on = vlm.decoder.forward(vlm.embed(np.array([answer[tokens - 1]]))).copy()
            assert going_on.argmax() == answer[tokens]


def test_an_answer_that_was_left_alone_does_not_touch_the_next(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        expected = vlm.generate(TEXT, max_new_tokens=30, ignore_eos=True).token_ids
        left = vlm.stream(TEXT, max_new_tokens=30, ignore_eos=True, speculation=8)
        for _ in range(9):
            next(left)
        begun = vlm.stream(TEXT, max_new_tokens=30, ignore_eos=True, speculation=8)
        first = next(begun)
        with pytest.raises(MllmEdgeError, match="given up"):
            next(left)
        rest = list(begun)
        assert rest[-1].result is not None
        assert rest[-1].result.token_ids == expected
        assert first.token_ids == expected[:1]


def test_nothing_is_guessed_from_a_stop_id_on(tiny_bundle: Path) -> None:
    with VLM.load(tiny_bundle, threads=1) as vlm:
        answer, trace = run(vlm, 20), Trace()
        end = next(i for i in range(4, 20) if answer[i] not in answer[:i])
        assert run(vlm, 20, Known(answer, 15), trace, [answer[end]]) == answer[:end]
    assert trace.counts["guessed"] == trace.counts["accepted"] == end - 1
