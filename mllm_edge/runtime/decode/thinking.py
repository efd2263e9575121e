"""The part of an answer in which a model thinks, between two tokens of its vocabulary such as <think> and </think>: how
long it may be, and what comes behind it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.errors import OptionError
from mllm_edge.runtime.decode.constraint import Constraint
from mllm_edge.runtime.prompt.tokenizer import Tokenizer

__all__ = ["Thinking", "ThinkingTokens", "thinking_tokens"]

# Those of GLM, Kimi-VL and Mistral; Qwen, InternVL and others have GLM's.
_ENDS = ("</think>", "◁/think▷", "[/THINK]")


@dataclass(frozen=True)
class ThinkingTokens:
    """The ids of the tokens around what a model thinks. `start` None: it thinks from the answer's beginning."""

    start: int | None
    end: int

    def opened(self, prompt_ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bool:
        """Whether a prompt ends where the model thinks, by its template: with `start`, and perhaps a line break."""
        if self.start is None:
            return True
        for token in reversed(prompt_ids):
            if token == self.start:
                return True
            if tokenizer.decode([int(token)], skip_special_tokens=False).strip():
                return False
        return False


def thinking_tokens(tokenizer: Tokenizer, end: str | None = None) -> ThinkingTokens | None:
    """Those of a tokenizer, `end` being the second's name; without it, those that models are known to have, None where
    there are none. The first one's name is the same without its slash. Raises OptionError for an `end` that is not one
    of the added tokens."""
    ids = {name: i for i, name in tokenizer.added_tokens.items()}
    if end is not None and (not isinstance(end, str) or end not in ids):
        raise OptionError(
            f"thinking_end: {end!r:.60} is none of the tokenizer's added tokens",
            "name the token that ends the model's thinking, such as '</think>'",
        )
    end = next((name for name in _ENDS if name in ids), None) if end is None else end
    if end is None:
        return None
    start = end.replace("/", "", 1)
    return ThinkingTokens(ids[start] if start != end and start in ids else None, ids[end])


class Thinking:
    """At most `most` tokens (None: any number) between the two `tokens`, and behind them what `behind` allows; see
    `Constraint`.

    `inside`: the prompt ends within. Otherwise an answer with something `behind` thinks at its beginning or not at all.
    """

    def __init__(
        self,
        tokens: ThinkingTokens,
        most: int | None,
        inside: bool,
        behind: Constraint | None,
        vocab_size: int,
        stop_ids: Collection[int],
    ):
        self._tokens, self._most, self._behind = tokens, most, behind
        self._size, self._stop_ids = vocab_size, frozenset(stop_ids)
        self._inside, self._begun = inside, inside
        self._count = 0
        self.lead = behind is None or behind.lead

    @property
    def ended(self) -> bool:
        return not self._inside and self._behind is not None and self._behind.ended

    def allows(self, token: int) -> bool:
        if self._inside:
            return token == self._tokens.end if self._used_up else self._behind is None or token not in self._stop_ids
        return self._behind is None or self._may_begin(token) or self._behind.allows(token)

    def allowed(self) -> np.ndarray | None:
        if self._inside and self._used_up:
            return self._only(self._tokens.end)
        if self._behind is None:
            return None
        if self._inside:
            allowed = np.ones(self._size, bool)
            allowed[list(self._stop_ids)] = False  # the answer proper is still to come
            return allowed
        behind = self._behind.allowed()
        start = self._tokens.start
        return behind | self._only(start) if behind is not None and start is not None and not self._begun else behind

    def observe(self, token: int) -> None:
        if self._inside:
            self._inside = token != self._tokens.end
            self._count += 1
        elif (self._behind is None and token == self._tokens.start) or self._may_begin(token):
            self._inside, self._count = True, 0
        elif self._behind is not None:
            self._behind.observe(token)
        self._begun = True

    def forced(self) -> Sequence[int]:
        if self._inside:
            return (self._tokens.end,) if self._used_up else ()
        may_begin = not self._begun and self._tokens.start is not None
        return () if self._behind is None or may_begin else self._behind.forced()

    def possible(self, tokens: list[int]) -> int:
        """Up to where the thinking begins or ends: more is not guessed at once."""
        marks = (self._tokens.start, self._tokens.end)
        plain = next((i for i, token in enumerate(tokens) if token in marks), len(tokens))
        if self._inside:
            return plain if self._most is None else min(plain, self._most - self._count)
        return plain if self._behind is None else self._behind.possible(tokens[:plain])

    @property
    def _used_up(self) -> bool:
        return self._most is not None and self._count >= self._most

    def _may_begin(self, token: int) -> bool:
        """Whether `token` begins the thinking of an answer with something behind it."""
        return self._behind is not None and not self._begun and token == self._tokens.start

    def _only(self, token: int) -> np.ndarray:
        allowed = np.zeros(self._size, bool)
        allowed[token] = True
        return allowed
