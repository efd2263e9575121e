"""How likely tokens and answers are, by the model's own logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.sampling import Sampler

__all__ = ["AnswerScore", "Scoring", "TokenScore", "answer_scores", "log_softmax", "token_score"]


@dataclass(frozen=True)
class TokenScore:
    """A token's natural logarithm of its probability, before any penalty, temperature or guide, and the `alternatives`
    (token id, its logarithm) that were likeliest in its place, the likeliest first."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class AnswerScore:
    """How likely an answer is behind a prompt: `logprob`, the natural logarithm of its probability, is the sum of its
    `tokens`'; `share`: its part of the probability of all answers that were scored together."""

    answer: str
    logprob: float
    share: float
    tokens: tuple[TokenScore, ...]

    @property
    def mean(self) -> float:
        """The mean logarithm of a token: for answers of unequal length."""
        return self.logprob / len(self.tokens)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities [K, V] float32 of logits [K, V]."""
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_score(row: np.ndarray, token: int, top: int) -> TokenScore:
    """The score of a token by the logits [V] that it was chosen from, with the `top` likeliest."""
    (logs,) = log_softmax(row[None])
    best = np.argpartition(-logs, min(top, len(logs) - 1))[:top] if top else np.zeros(0, np.int64)
    ranked = sorted(best.tolist(), key=lambda i: (-logs[i], i))
    return TokenScore(token, float(logs[token]), tuple((i, float(logs[i])) for i in ranked))


class Scoring:
    """A sampler that notes the score of each token that it chooses, with the `top` likeliest."""

    needs: int | None = None  # all logits

    def __init__(self, sampler: Sampler, top: int):
        self._sampler, self._top = sampler, top
        self.scores: list[TokenScore] = []

    @property
    def ended(self) -> bool:
        """As `Sampler.ended`."""
        return self._sampler.ended

    def certain(self, tokens: Sequence[int]) -> int:
        """None: of each the logits are told."""
        return 0

    def sample(self, row: np.ndarray | TopLogits | None) -> int:
        """As `Sampler.sample`, of all logits [V]."""
        assert isinstance(row, np.ndarray), "needs is None"
        logits = row.copy()  # penalties write into them
        token = self._sampler.sample(row)
        self.scores.append(token_score(logits, token, self._top))
        return token


def answer_scores(
    decoder: Decoder,
    embed: Callable[[np.ndarray], np.ndarray],
    first: np.ndarray,
    answers: Sequence[tuple[str, np.ndarray]],
) -> list[AnswerScore]:
    """The scores of answers, each with its tokens [n], behind what the decoder holds, whose last logits are `first`
    [V]; the decoder holds the same afterwards."""
    cache, found = decoder.cache, list[list[TokenScore]]()
    assert cache is not None, "reset() comes first"
    begin = cache.length
    before = None if decoder.rewindable else decoder.snapshot()
    first = first.copy()
    for _, tokens in answers:
        scores = [token_score(first, int(tokens[0]), 0)]
        if len(tokens) > 1:
            for start in range(0, len(tokens) - 1, decoder.rows):
                part = tokens[:-1][start : start + decoder.rows]
                rows = decoder.forward(embed(part), project=range(len(part)))
                following = tokens[start + 1 : start + 1 + len(part)].tolist()
                scores += [token_score(row, token, 0) for row, token in zip(rows, following, strict=True)]
            if before is None:
                cache.truncate(begin)
            else:
                decoder.restore(before)
        found.append(scores)
    sums = np.array([sum(score.logprob for score in scores) for scores in found], np.float64)
    weights = np.exp(sums - sums.max())
    return [
        AnswerScore(text, float(total), float(share), tuple(scores))
        for (text, _), total, share, scores in zip(answers, sums, weights / weights.sum(), found, strict=True)
    ]
