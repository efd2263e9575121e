"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from mllm_edge.errors import BundleError
from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.constraint import Constraint
from mllm_edge.runtime.decode.token_rules import TokenRules
from mllm_edge.runtime.numbers import LARGEST, number, whole

__all__ = ["Sampler", "SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The defaults choose the most probable token (greedy).

    `temperature` 0 is greedy. `top_k` keeps the k best (0: all), `top_p` the smallest set with that probability,
    `min_p` tokens with at least that fraction of the best one's probability. `repetition_penalty` (1: none) applies to
    tokens of the prompt and the answer; `frequency_penalty` per occurrence and `presence_penalty` once, to the answer
    only. The same `seed` gives the same tokens. Raises OptionError naming the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._hold(temperature=number("temperature", self.temperature, 0))
        self._hold(top_k=whole("top_k", self.top_k, 0))
        self._hold(top_p=number("top_p", self.top_p, 0, 1, above=True))
        self._hold(min_p=number("min_p", self.min_p, 0, 1))
        self._hold(repetition_penalty=number("repetition_penalty", self.repetition_penalty, 0, above=True))
        self._hold(frequency_penalty=number("frequency_penalty", self.frequency_penalty, -LARGEST))
        self._hold(presence_penalty=number("presence_penalty", self.presence_penalty, -LARGEST))
        if self.seed is not None:
            self._hold(seed=whole("seed", self.seed, 0))

    def _hold(self, **values: float) -> None:
        """Python's own numbers: numpy's may be too narrow to be reckoned with."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Sampler:
    """Chooses one token after another for one answer; remembers the tokens for the penalties, for `rules` and for the
    `constraint`, which is told of each.

    What a constraint does not allow has no probability at all, before anything else is decided. Where it allows nothing
    but what the rules forbid, they give way.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] | np.ndarray = (),
        rules: TokenRules | None = None,
        constraint: Constraint | None = None,
    ):
        self._params, self._rules, self._constraint = params, rules, constraint
        # numpy.random takes 0.1 s to import: a greedy answer does without it.
        self._random = None if params.temperature == 0 else np.random.default_rng(params.seed)
        # np.unique imports numpy.ma, a tenth of the time from the process's start to its first token.
        self._seen = np.array(sorted(set(np.asarray(prompt_ids, np.int64).tolist())), np.int64)
        self._counts: dict[int, int] = {}

    @property
    def needs(self) -> int | None:
        """How many of the largest logits decide, with all that equal the smallest of these; None: all logits do."""
        params = self._params
        if self._rules is not None:
            return None
        if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            return None
        return 1 if params.temperature == 0 else params.top_k or None

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more, by the constraint; the model's own end is not needed then."""
        return self._constraint is not None and self._constraint.ended

    def certain(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` come next whatever the logits are."""
        forced = () if self._constraint is None else self._constraint.forced()
        pairs = zip(tokens, forced, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def sample(self, logits: np.ndarray | TopLogits | None) -> int:
        """The next token for `logits` [V] float32, which stay as they are, or for the best of them where `needs` is a
        number: the token is the same. None will do where the token is certain.

        Raises ValueError when the best logit is not finite (NaN anywhere, +inf, or everything −inf), OptionError where
        the constraint allows no token.
        """
        forced = () if self._constraint is None else self._constraint.forced()
        if forced:
            token = forced[0]
        elif isinstance(logits, TopLogits):
            token = self._of_top(logits)
        else:
            assert logits is not None, "the token is not certain"
            token = self._choose(logits, self._constraint)
        self.observe(token)
        return token

    def _of_top(self, logits: TopLogits) -> int:
        assert self.needs is not None, "all logits decide"
        ids, row = logits.row(self.needs)
        constraint = self._constraint
        if constraint is not None and ids is not None:
            token = int(ids[np.argmax(row)])
            _require_finite(row.max())
            if self._random is None and constraint.allows(token):
                return token
            ids, row = logits.row(self.needs, constraint.allowed())
        place = self._choose(row, constraint if ids is None else None)
        return place if ids is None else int(ids[place])

    def _choose(self, logits: np.ndarray, constraint: Constraint | None) -> int:
        if self._random is None:
            penalized = self._penalized(logits)
            token = int(np.argmax(penalized))
            _require_finite(penalized[token])
            if constraint is None or constraint.allows(token):
                return token
            ids, allowed = self._allowed(penalized, logits, constraint)
            place = int(np.argmax(allowed))
            return place if ids is None else int(ids[place])
        ids, probabilities = self._distribution(logits, constraint)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        last = np.searchsorted(cumulative, cumulative[-1])  # behind it every probability is 0
        return int(ids[min(drawn, last)])

    def observe(self, token: int) -> None:
        """Count `token` as part of the answer (`sample` does this itself; forced tokens need it)."""
        if token not in self._counts and self._params.repetition_penalty != 1.0:
            self._seen = np.append(self._seen, token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._rules is not None:
            self._rules.observe(token)
        if self._constraint is not None:
            self._constraint.observe(token)

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates for `logits` [V] float32: ids [K] int64 and their probabilities [K] float64, which sum to 1.

        At temperature 0 there is one candidate. Raises as `sample` does.
        """
        return self._distribution(logits, self._constraint)

    def _distribution(self, row: np.ndarray, constraint: Constraint | None) -> tuple[np.ndarray, np.ndarray]:
        params = self._params
        logits = self._penalized(row)
        best = int(np.argmax(logits))
        _require_finite(logits[best])
        among = None
        if constraint is not None:
            among, logits = self._allowed(logits, row, constraint)
            best = int(np.argmax(logits))
        if params.temperature == 0:
            return np.array([best if among is None else among[best]]), np.ones(1)
        ids = _top_k(logits, params.top_k)
        weights = _weights(logits if ids is None else logits[ids], logits[best], params.temperature)
        if params.top_p < 1.0:
            ids, weights = _keep(_top_p(weights, params.top_p), ids, weights)
        if params.min_p > 0.0:
            ids, weights = _keep(np.flatnonzero(weights >= params.min_p), ids, weights)
        if ids is None:
            ids = np.arange(len(logits))
        return ids if among is None else among[ids], weights / weights.sum(dtype=np.float64)

    def _allowed(
        self, penalized: np.ndarray, row: np.ndarray, constraint: Constraint
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """The ids (None: all) that the constraint allows, and what they have of `penalized` [V], which `row` has
        become."""
        allowed = constraint.allowed()
        if allowed is None:
            return None, penalized
        ids = np.flatnonzero(allowed)
        logits = penalized[ids]
        if self._rules is not None and not np.isfinite(logits.max()):
            logits = self._with_penalties(row)[ids]
        _require_finite(logits.max())
        return ids, logits

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        logits = np.asarray(logits)
        if logits.ndim != 1 or logits.size == 0:
            raise ValueError(f"logits must be one row [V], not {logits.shape}")
        if self._rules is None:
            return self._with_penalties(logits)
        # Last, so that a forbidden token stays so.
        return self._rules.apply(self._with_penalties(logits))

    def _with_penalties(self, logits: np.ndarray) -> np.ndarray:
        params = self._params
        repetition = params.repetition_penalty != 1.0 and len(self._seen) > 0
        counted = bool(self._counts) and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0)
        if not repetition and not counted:
            return logits
        logits = logits.astype(np.float32)
        if repetition:
            seen = self._seen[(self._seen >= 0) & (self._seen < len(logits))]
            values = logits[seen]
            penalty = np.float32(params.repetition_penalty)
            logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        if counted:
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[ids] -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
        return logits


def _require_finite(best: np.floating) -> None:
    # argmax stops at a NaN, so looking at the best logit alone finds one anywhere.
    if not np.isfinite(best):
        raise BundleError(
            f"logits contain NaN or infinity (best is {best})",
            "check the files with `mllm-edge inspect BUNDLE --verify`; where all are whole the model overflowed: "
            "export it again with more precision (--recipe fp32)",
        )


def _weights(logits: np.ndarray, best: np.floating, temperature: float) -> np.ndarray:
    """Probabilities relative to the best token's, which is exactly 1; float32, as exponentials are most of the cost."""
    scores = logits.astype(np.float32) - np.float32(best)
    with np.errstate(over="ignore", under="ignore"):
        scores /= np.float32(max(temperature, 1e-30))  # 0 in float32 would make 0 / 0 of the best one
        return np.exp(scores, out=scores)


def _keep(kept: np.ndarray, ids: np.ndarray | None, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return kept if ids is None else ids[kept], weights[kept]


def _top_k(logits: np.ndarray, k: int) -> np.ndarray | None:
    """Ids of the k largest logits and of any that equal the smallest of them; None stands for all ids."""
    if not 0 < k < len(logits):
        return None
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def _top_p(weights: np.ndarray, p: float) -> np.ndarray:
    """Indices of the largest weights, best first, up to and with the one at which their share of the sum reaches p."""
    total = weights.sum(dtype=np.float64)
    # All weights below (1 − p) / V of the sum together stay below 1 − p of it: none of them can be kept, so only the
    # others need sorting.
    candidates = np.flatnonzero(weights >= total * (1.0 - p) / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    sorted_weights = weights[order].astype(np.float64)
    before = np.cumsum(sorted_weights) - sorted_weights
    return order[: max(1, int(np.count_nonzero(before < p * total)))]
