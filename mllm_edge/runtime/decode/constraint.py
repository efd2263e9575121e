"""What an answer must be beside likely: which tokens may come, told one token after another."""

from typing import Protocol

import numpy as np

from mllm_edge.runtime.decode.speculation import Guesser

__all__ = ["ConstrainedGuesser", "Constraint"]


class Constraint(Protocol):
    """What may come behind the tokens of one answer that were observed.

    `lead`: whitespace before the answer is none of it. `ended`: nothing can come any more, not even the model's end is
    needed.
    """

    lead: bool

    @property
    def ended(self) -> bool: ...

    def allows(self, token: int) -> bool:
        """Whether `token` may come next: cheaper than `allowed` where one token is asked about."""
        ...

    def allowed(self) -> np.ndarray | None:
        """Which tokens may come next, [V] bool; None: any. Raises OptionError where there is none."""
        ...

    def observe(self, token: int) -> None:
        """`token` is the next one of the answer; it was allowed."""
        ...

    def forced(self) -> list[int]:
        """Tokens that are as good as certain to come next, for the text that they spell is."""
        ...

    def possible(self, tokens: list[int]) -> int:
        """How many of `tokens` may come in a row."""
        ...


class ConstrainedGuesser:
    """Guesses what is certain to come, `most` tokens at a time, else what another guesser guesses and may come."""

    def __init__(self, guesser: Guesser, constraint: Constraint, most: int):
        self._guesser, self._constraint, self._most = guesser, constraint, most

    def guess(self, count: int) -> list[int]:
        forced = self._constraint.forced()[: min(count, self._most)]
        if forced:
            self._guesser.guess(0)  # it is asked before each step
            return forced
        guess = self._guesser.guess(count)
        return guess[: self._constraint.possible(guess)]

    def observe(self, token: int) -> None:
        self._guesser.observe(token)
