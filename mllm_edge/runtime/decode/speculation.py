"""Guesses of the tokens to come, which the decoder checks several at a time.

Prompt lookup (Apoorv Saxena, "Prompt Lookup Decoding", 2023): an answer often repeats what the prompt or it itself said
before, so what followed the last tokens there is a guess that costs nothing. Checking changes no token (Leviathan,
Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192): a guess only decides
how many rows of logits are there at once, the sampler chooses as ever.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mllm_edge.errors import OptionError
from mllm_edge.runtime.limits import MOST_ROWS
from mllm_edge.runtime.numbers import whole

__all__ = ["MOST_GUESSED", "Guesser", "PromptLookup", "check_speculation"]

MOST_GUESSED = MOST_ROWS - 1
# Tokens that must have stood together before. One alone is right too rarely to pay.
_LENGTHS = (3, 2)
_IMAGE = -1


class Guesser(Protocol):
    """Guesses what comes next; `generate` tells it every token and asks before each step."""

    def guess(self, count: int) -> list[int]:
        """The tokens that may follow all observed ones, `count` (0 or more) at most; none is a fair answer."""
        ...

    def observe(self, token: int) -> None:
        """`token` is the next one of the answer."""
        ...


class PromptLookup:
    """Guesses what followed the most recent earlier occurrence of the last three tokens, or else of the last two.

    `prompt_ids` [S]; `image_positions` of them stand for image features: they match nothing and are never guessed. At
    most `most` tokens are guessed at once, and after a guess that was wrong somewhere no more than were right in it
    (one at least), twice as many after each that was right as a whole: text without repeats costs little.
    """

    def __init__(
        self, prompt_ids: Sequence[int] | np.ndarray, most: int, image_positions: Sequence[int] | np.ndarray = ()
    ):
        check_speculation(most)
        ids = np.array(prompt_ids, np.int64)
        ids[np.asarray(image_positions, np.int64)] = _IMAGE
        self._most = self._length = most
        self._history: list[int] = []
        # The place behind the latest occurrence of several tokens in a row; there is a token at each.
        self._behind: dict[tuple[int, ...], int] = {}
        self._guessed: list[int] = []
        self._right = 0
        for token in ids.tolist():
            self._append(token)

    def guess(self, count: int) -> list[int]:
        self._adapt()
        for length in _LENGTHS:
            start = self._behind.get(tuple(self._history[-length:]))
            if start is not None:
                self._guessed, self._right = self._copied(start, min(count, self._length)), 0
                return list(self._guessed)
        return []

    def observe(self, token: int) -> None:
        if self._guessed[self._right : self._right + 1] == [token]:
            self._right += 1
        self._append(token)

    def _append(self, token: int) -> None:
        history = self._history
        if token != _IMAGE:
            for length in _LENGTHS:
                key = tuple(history[-length:])
                if len(key) == length and _IMAGE not in key:
                    self._behind[key] = len(history)
        history.append(token)

    def _copied(self, start: int, count: int) -> list[int]:
        """What stands from `start` on; behind the end of the history it goes on with the copy, as a loop does."""
        text = self._history[start : start + count]
        period = len(self._history) - start
        text += [text[i % period] for i in range(len(text), count)]
        return text[: text.index(_IMAGE)] if _IMAGE in text else text

    def _adapt(self) -> None:
        """The next guess's length, by how the last one fared."""
        if self._guessed:
            whole = self._right == len(self._guessed)
            self._length = min(self._most, 2 * self._length) if whole else max(1, self._right)
        self._guessed = []


def check_speculation(count: int, rewindable: bool = True) -> None:
    """Raise OptionError unless so many tokens can be guessed at once, by a decoder that is `rewindable` or not."""
    if whole("speculation", count, 0, MOST_GUESSED) and not rewindable:
        raise OptionError(
            "speculation: this model has layers with a recurrent state, from which a token that was guessed wrong "
            "cannot be taken back",
            "leave speculation out",
        )
