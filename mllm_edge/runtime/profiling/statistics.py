"""Samples in short, and how far they can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "NOISE_BOUND",
    "PERCENTILES",
    "Distribution",
    "Jitter",
    "Noise",
    "is_settled",
    "jitter",
    "noise",
    "samples_needed",
]

PERCENTILES = (10, 90, 99)
# A spread beyond this is called noise: two such runs can differ by a tenth with nothing changed.
NOISE_BOUND = 0.1
_FAR = 3.0
_LAST, _FALL = 2, 0.01  # warm-up calls that bring nothing new, and what would be new


@dataclass(frozen=True)
class Distribution:
    """Samples of all runs in short, in the samples' own unit. `percentiles` ("p10", …) has those that the samples
    suffice for. `outliers` lie more than three interquartile ranges outside the quartiles.

    `spread` is between runs, each a load of its own: (largest − smallest of the runs' medians) / median, so that no two
    runs differ by more; None for one run. Samples of one run tell little of the next, for clocks drift and memory lies
    elsewhere.
    """

    count: int
    median: float
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]
    spread: float | None
    outliers: int

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> "Distribution":
        """Summarize one run or more, each of one sample or more. Percentile p needs one sample beyond it: 10 for p90,
        100 for p99."""
        values = np.concatenate([np.asarray(run, np.float64) for run in runs])
        medians = [np.median(run) for run in runs]
        known = {p: float(np.percentile(values, p)) for p in PERCENTILES if len(values) >= samples_needed(p)}
        median = float(np.median(values))
        first, third = np.percentile(values, (25, 75))
        reach = _FAR * (third - first)
        return cls(
            count=len(values),
            median=median,
            minimum=float(values.min()),
            maximum=float(values.max()),
            percentiles={f"p{p}": value for p, value in known.items()},
            spread=float(max(medians) - min(medians)) / median if len(runs) > 1 and median else None,
            outliers=int(((values < first - reach) | (values > third + reach)).sum()),
        )


@dataclass(frozen=True)
class Jitter:
    """`seconds`: the mean absolute difference between an interval between tokens and the next one of the same call;
    `relative`: that over the median interval. A steady drift is no jitter, every second token late is."""

    seconds: float
    relative: float


@dataclass(frozen=True)
class Noise:
    """The larger of two spreads between runs: that of the whole calls (total), and that of the calls' mean time per
    token (tpot). `spread` None: one run tells nothing.
    """

    name: str
    spread: float | None
    bound: float = NOISE_BOUND

    @property
    def noisy(self) -> bool:
        """Whether the spread is over the bound."""
        return self.spread is not None and self.spread > self.bound


def samples_needed(percentile: int) -> int:
    """The fewest samples of which one lies beyond this percentile."""
    return -(-100 // min(percentile, 100 - percentile))


def jitter(calls: Sequence[Sequence[float]]) -> Jitter | None:
    """Of the intervals of each call; None where no call has two."""
    steps = np.concatenate([np.abs(np.diff(intervals)) for intervals in calls] or [np.zeros(0)])
    if not steps.size:
        return None
    seconds = float(steps.mean())
    median = float(np.median(np.concatenate([np.asarray(intervals) for intervals in calls])))
    return Jitter(seconds, seconds / median if median else 0.0)


def noise(totals: Sequence[Sequence[float]], tpots: Sequence[Sequence[float]]) -> Noise:
    """Of calls' total seconds and mean seconds per token, by run; without the latter for answers of one token."""
    spreads = {"total": Distribution.of(totals).spread, "tpot": Distribution.of(tpots).spread if tpots else None}
    name = max(spreads, key=lambda name: spreads[name] or 0.0)
    return Noise(name, spreads[name])


def is_settled(totals: Sequence[float]) -> bool:
    """Whether warm-up calls have stopped becoming faster: neither of the last two beats all before them by 1%."""
    return len(totals) > _LAST and min(totals[-_LAST:]) >= (1 - _FALL) * min(totals[:-_LAST])
