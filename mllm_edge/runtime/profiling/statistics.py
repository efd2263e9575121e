"""Samples in short, and how far they can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NOISE_BOUND", "PERCENTILES", "Distribution", "Jitter", "Noise", "jitter", "noise", "samples_needed"]

PERCENTILES = (10, 90, 99)
# A spread beyond this is called noise: two such runs can differ by a tenth with nothing changed.
NOISE_BOUND = 0.1
_FAR = 3.0


@dataclass(frozen=True)
class Distribution:
    """Samples in short, in the samples' own unit. `percentiles` ("p10", …) has those that the samples suffice for.

    `spread` is (p90 − p10) / median, or (maximum − minimum) / median where the samples are too few for p90; None for
    one sample. `outliers` lie more than three interquartile ranges outside the quartiles.
    """

    count: int
    median: float
    minimum: float
    maximum: float
    percentiles: Mapping[str, float]
    spread: float | None
    outliers: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Distribution":
        """Summarize one sample or more. Percentile p needs one sample beyond it: 10 for p90, 100 for p99."""
        values = np.asarray(samples, np.float64)
        known = {p: float(np.percentile(values, p)) for p in PERCENTILES if len(values) >= samples_needed(p)}
        median, low, high = float(np.median(values)), known.get(10, values.min()), known.get(90, values.max())
        first, third = np.percentile(values, (25, 75))
        reach = _FAR * (third - first)
        return cls(
            count=len(values),
            median=median,
            minimum=float(values.min()),
            maximum=float(values.max()),
            percentiles={f"p{p}": value for p, value in known.items()},
            spread=float(high - low) / median if len(values) > 1 and median else None,
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
    """The larger of two spreads: that of the whole calls (total), and that of the calls' mean time per token (tpot).

    `spread` None: one call tells nothing.
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


def noise(totals: Sequence[float], tpots: Sequence[float]) -> Noise:
    """Of calls' total seconds and mean seconds per token; without the latter for answers of one token."""
    spreads = {"total": Distribution.of(totals).spread, "tpot": Distribution.of(tpots).spread if tpots else None}
    name = max(spreads, key=lambda name: spreads[name] or 0.0)
    return Noise(name, spreads[name])
