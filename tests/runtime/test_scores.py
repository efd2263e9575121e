"""How likely answers and tokens are: beside the model's logits, one token after another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import VLM
from mllm_edge.errors import OptionError
from mllm_edge.runtime.trace import Trace

ANSWERS = ["yes", "no", "a cat on a mat"]
FRAME = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> Iterator[VLM]:
    with VLM.load(tiny_bundle, backend="cpu") as vlm:
        yield vlm


def expected(vlm: VLM, tokens: list[int]) -> np.ndarray:
    """Logarithms of the probabilities of tokens behind a question about a picture."""
    prompt = vlm.encode(vlm.processor.process("Is there a cat?", FRAME))
    rows = vlm.score(prompt, np.array(tokens)).astype(np.float64)
    logs = rows - rows.max(axis=1, keepdims=True)
    return (logs - np.log(np.exp(logs).sum(axis=1, keepdims=True)))[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "encoded"])
def test_scores_are_the_models_own(vlm: VLM, seen: bool) -> None:
    image: Any = vlm.encode_image(FRAME) if seen else FRAME
    if seen:
        vlm.generate("Is there a dog?", image, max_new_tokens=3)
    trace = Trace()
    scores = vlm.score_answers("Is there a cat?", image, answers=ANSWERS, trace=trace)
    assert (trace.runs("vision_encoder") == 0) == seen
    assert [score.answer for score in scores] == ANSWERS
    for score in scores:
        tokens = [token.token_id for token in score.tokens]
        assert vlm.tokenizer.decode(tokens).strip() == score.answer
        logs = expected(vlm, tokens)
        np.testing.assert_allclose([token.logprob for token in score.tokens], logs, atol=1e-4)
        assert score.logprob == pytest.approx(logs.sum(), abs=1e-3)
        assert score.mean == pytest.approx(logs.mean(), abs=1e-4)
    shares = np.exp([score.logprob for score in scores])
    np.testing.assert_allclose([score.share for score in scores], shares / shares.sum(), rtol=1e-4)


def test_the_end_counts_when_it_is_asked_for(vlm: VLM) -> None:
    (plain,) = vlm.score_answers("Is there a cat?", FRAME, answers=["no"])
    (ended,) = vlm.score_answers("Is there a cat?", FRAME, answers=["no"], ended=True)
    assert len(ended.tokens) == len(plain.tokens) + 1
    assert ended.tokens[-1].token_id in vlm.stop_ids
    assert ended.logprob < plain.logprob


def test_the_next_answer_is_as_before(vlm: VLM) -> None:
    before = vlm.generate("Hello.", max_new_tokens=8).token_ids
    vlm.score_answers("Is there a cat?", FRAME, answers=ANSWERS)
    assert vlm.generate("Hello.", max_new_tokens=8).token_ids == before


@pytest.mark.parametrize(
    ("answers", "word"),
    [([], "no answers"), ([""], "an answer is ''"), ([5], "an answer is 5"), (["<image>"], "spells '<image>'")],
)
def test_answers_that_cannot_be(vlm: VLM, answers: Any, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        vlm.score_answers("Is there a cat?", FRAME, answers=answers)


@pytest.mark.parametrize("speculation", [0, 4])
def test_pieces_tell_how_likely_their_tokens_were(vlm: VLM, speculation: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True, "speculation": speculation}
    plain = vlm.generate("Is there a cat?", FRAME, **options)
    pieces = list(vlm.stream("Is there a cat?", FRAME, logprobs=3, **options))
    result = pieces[-1].result
    assert result is not None
    assert result.token_ids == plain.token_ids
    assert plain.logprobs == ()
    told = [score for piece in pieces for score in piece.logprobs]
    assert tuple(told) == result.logprobs
    assert [score.token_id for score in told] == list(result.token_ids)
    np.testing.assert_allclose([s.logprob for s in told], expected(vlm, list(result.token_ids)), atol=1e-4)
    for score in told:  # greedy: the likeliest was chosen
        assert len(score.alternatives) == 3
        assert score.alternatives[0] == (score.token_id, score.logprob)
        assert [log for _, log in score.alternatives] == sorted((log for _, log in score.alternatives), reverse=True)


def test_logprobs_are_of_the_model_and_not_of_the_draw(vlm: VLM) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 5, "max_new_tokens": 6, "repetition_penalty": 1.5}
    result = vlm.generate("Is there a cat?", FRAME, logprobs=0, ignore_eos=True, **options)
    assert all(score.alternatives == () for score in result.logprobs)
    logs = expected(vlm, list(result.token_ids))
    np.testing.assert_allclose([score.logprob for score in result.logprobs], logs, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, 101, 1.5, True])
def test_wrong_numbers_of_alternatives(vlm: VLM, wrong: Any) -> None:
    with pytest.raises(OptionError, match="logprobs"):
        vlm.generate("Hi", logprobs=wrong)
