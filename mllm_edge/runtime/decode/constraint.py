"""What an answer must be beside likely: which tokens may come, told one token after another."""

from collections.abc import Sequence
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

    def forced(self) -> Sequence[int]:
        """The tokens that come next whatever the logits are, none of which is a stop id: those of a text that nothing
        else may stand in place of, as the tokenizer spells it."""
        ...

    def possible(self, tokens: list[int]) -> int:
        """How many of `tokens` may come in a row."""
        ...


class ConstrainedGuesser:
    """Guesses what is forced, else what another guesser guesses and may come."""

    def __init__(self, constraint: Constraint, guesser: Guesser | None):
        self._constraint, self._guesser = constraint, guesser

    def guess(self, count: int) -> list[int]:
        forced = list(self._constraint.forced()[:count])
        if self._guesser is None:
            return forced
        guess = self._guesser.guess(0 if forced else count)  # it is asked before each step
        return forced or guess[: self._constraint.possible(guess)]

    def observe(self, token: int) -> None:
        if self._guesser is not None:
            self._guesser.observe(token)
