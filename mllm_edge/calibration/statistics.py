"""What calibration remembers of a linear layer's input: sums and counts, never the activations themselves."""

from dataclasses import dataclass

import numpy as np

__all__ = ["HELD_BYTES", "HeldRows", "Histogram", "InputStatistics"]

_BINS = 2048
# Rows kept as they are, for methods that try candidates on real inputs; spread evenly over all that were seen.
_SAMPLE_ROWS = 512
# Rows that wait for a product together: a few alone take as long as these, for the whole matrix passes through memory.
_WAITING_ROWS = 1024
# Rows held apart that candidates are judged on; more tell little, and are one product for each candidate.
_HELD_ROWS = 1024
HELD_BYTES = 256 << 20  # of rows held apart that are in memory, of all inputs that are looked at together


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Rows that no method saw: `x` [n, K] as the layers get them, `exact` [n, K] as the float model has them (x itself,
    where that is not known to differ), and their `weights` [n]."""

    x: np.ndarray
    exact: np.ndarray
    weights: np.ndarray

    def outputs(self, weight: np.ndarray) -> np.ndarray:
        """y [n, N] of a float layer [N, K], which what was found is held against."""
        return self.exact @ weight.T

    def error(self, found: np.ndarray, wanted: np.ndarray) -> float:
        """‖ŷ − y‖/‖y‖ with the weight `found` [N, K], against the outputs `wanted` [n, N]."""
        difference = self.x @ found.T
        difference -= wanted
        return float(np.sqrt(self.squared(difference)) / max(np.sqrt(self.squared(wanted)), 1e-12))

    def squared(self, outputs: np.ndarray) -> float:
        """‖y‖² of outputs [n, N], which turns relative errors of several layers into a sum."""
        return float(np.einsum("ij,ij->i", outputs, outputs).astype(np.float64) @ self.weights)


class Histogram:
    """Counts of values in `_BINS` equal bins over [−limit, limit]; the limit doubles when a value exceeds it, so one
    pass is enough and earlier counts stay right (two bins become one)."""

    def __init__(self, limit: float = 0.0, counts: np.ndarray | None = None):
        self.limit = limit
        self.counts = np.zeros(_BINS, np.int64) if counts is None else counts

    def add(self, values: np.ndarray) -> None:
        """Count finite values of any shape."""
        peak = float(np.abs(values).max(initial=0.0))
        if peak == 0.0 and self.limit == 0.0:
            return
        if self.limit == 0.0:
            self.limit = peak
        while self.limit < peak:
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(half, _BINS // 4)
            self.limit *= 2
        # As numpy's own histogram, but in float32: a third of its time.
        bins = values / np.float32(self.limit)
        bins += 1
        bins *= _BINS // 2
        found = np.bincount(bins.astype(np.int16).ravel(), minlength=_BINS + 1)
        found[_BINS - 1] += found[_BINS]  # the limit itself
        self.counts += found[:_BINS]

    @property
    def edges(self) -> np.ndarray:
        """The bins' borders, `_BINS` + 1 numbers."""
        return np.linspace(-self.limit, self.limit, _BINS + 1)


class InputStatistics:
    """Of inputs x [rows, K]: how many rows, the extremes and mean|x| of each channel, a histogram of all values, some
    rows as they were, and (if `with_gram`) the weighted means of xᵀx [K, K] and of (exact − x)ᵀx [K, K].

    Rows that are held apart are in none of what weights are fitted to (the sample, the matrices): see `held`."""

    def __init__(self, width: int, with_gram: bool = False, held_bytes: int = HELD_BYTES):
        self.width, self.rows = width, 0
        self.channel_low = np.full(width, np.inf, np.float32)
        self.channel_high = np.full(width, -np.inf, np.float32)
        self.histogram = Histogram()
        self._sums = np.zeros(width)
        self._gram = np.zeros((width, width), np.float32) if with_gram else None
        self._drift: np.ndarray | None = None
        # (x, exact − x) of rows that are not in the matrices yet, both times the root of the rows' weights.
        self._waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._sample: list[np.ndarray] = []
        self._stride, self._kept = 1, 0
        self.fitted_rows = 0
        # Parts of (x, exact where it differs, weights); every `_held_stride`-th row of them all.
        self._held: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []
        self._held_stride, self._held_seen = 1, 0
        self._most_held = max(_HELD_ROWS, held_bytes // (4 * width))

    def add(
        self,
        x: np.ndarray,
        weights: np.ndarray | None = None,
        exact: np.ndarray | None = None,
        held: bool = False,
    ) -> None:
        """Take in rows [..., K], with `weights` [rows] float32 of mean 1 in the matrices, by default all alike. `exact`
        [..., K]: what the float model has in their place, where that is known to differ. `held`: apart from the others.

        Raises ValueError for values that are not finite.
        """
        x = np.ascontiguousarray(x.reshape(-1, self.width), np.float32)
        if len(x) == 0:
            return
        low, high = x.min(axis=0), x.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("activations are not finite")
        np.minimum(self.channel_low, low, out=self.channel_low)
        np.maximum(self.channel_high, high, out=self.channel_high)
        self._sums += np.abs(x).sum(axis=0, dtype=np.float64)
        self.histogram.add(x)
        self.rows += len(x)
        if held:
            self._hold(x, None if exact is None else exact.reshape(-1, self.width).astype(np.float32), weights)
            return
        if self._gram is not None:
            moved = None if exact is None else exact.reshape(-1, self.width).astype(np.float32) - x
            if weights is None:
                self._waiting.append((x, moved))
            else:
                root = np.sqrt(weights)[:, None]
                self._waiting.append((x * root, None if moved is None else moved * root))
            if sum(len(rows) for rows, _ in self._waiting) >= _WAITING_ROWS:
                self._multiply()
        self._keep(x)
        self.fitted_rows += len(x)

    @property
    def channel_max(self) -> np.ndarray:
        """max|x| of each channel [K] float32; zeros before anything was seen."""
        return np.maximum(0, np.maximum(-self.channel_low, self.channel_high))

    @property
    def channel_mean(self) -> np.ndarray:
        """mean|x| of each channel [K] float32."""
        return (self._sums / max(self.rows, 1)).astype(np.float32)

    @property
    def gram(self) -> np.ndarray:
        """The weighted mean of xᵀx [K, K] float32; only with `with_gram`."""
        assert self._gram is not None, "the Gram matrix was not asked for"
        self._multiply()
        return self._gram / np.float32(max(self.fitted_rows, 1))

    @property
    def drift(self) -> np.ndarray | None:
        """The weighted mean of (exact − x)ᵀx [K, K] float32; None where nothing exact was given."""
        self._multiply()
        return None if self._drift is None else self._drift / np.float32(max(self.fitted_rows, 1))

    @property
    def held(self) -> HeldRows | None:
        """Rows that were held apart, spread evenly over them; None where there are none, or none that counts."""
        if not any(weights.any() for _, _, weights in self._held):
            return None
        x, weights = (np.concatenate([part[i] for part in self._held]) for i in (0, 2))
        exact = np.concatenate([own if other is None else other for own, other, _ in self._held])
        every = -(-len(x) // _HELD_ROWS)
        return HeldRows(x[::every], exact[::every], weights[::every])

    @property
    def sample(self) -> np.ndarray:
        """Up to `_SAMPLE_ROWS` of the rows, [n, K] float32."""
        kept = np.concatenate(self._sample) if self._sample else np.zeros((0, self.width), np.float32)
        return kept[:: -(-len(kept) // _SAMPLE_ROWS)] if len(kept) > _SAMPLE_ROWS else kept

    def scaled_histogram(self, factors: np.ndarray) -> Histogram:
        """The histogram of x / factors [K], from the sample."""
        histogram = Histogram()
        histogram.add(self.sample / factors)
        return histogram

    def _multiply(self) -> None:
        """Add the rows that wait to the matrices."""
        if not self._waiting:
            return
        rows, moved = zip(*self._waiting, strict=True)
        self._waiting = []
        together = np.concatenate(rows)
        self._gram += together.T @ together  # by itself: half the work
        if any(difference is not None for difference in moved):
            exact = [np.zeros_like(x) if d is None else d for x, d in zip(rows, moved, strict=True)]
            product = np.concatenate(exact).T @ together
            self._drift = product if self._drift is None else np.add(self._drift, product, out=self._drift)

    def _hold(self, x: np.ndarray, exact: np.ndarray | None, weights: np.ndarray | None) -> None:
        """Keep rows that are held apart; when there are too many, every other one is let go."""
        own = np.ones(len(x), np.float32) if weights is None else weights
        rows = slice(-self._held_seen % self._held_stride, None, self._held_stride)
        self._held_seen += len(x)
        self._held.append(_thinned(x, exact, own, rows))
        while sum(len(part[0]) for part in self._held) > self._most_held:
            self._held_stride *= 2
            kept, first = [], 0
            for part in self._held:
                kept.append(_thinned(*part, slice(first % 2, None, 2)))
                first += len(part[0])
            self._held = kept

    def _keep(self, x: np.ndarray) -> None:
        """Every `_stride`-th of all rows; when twice too many are kept, every other one is let go."""
        kept = x[-self.fitted_rows % self._stride :: self._stride].copy()
        self._sample.append(kept)
        self._kept += len(kept)
        while self._kept > 2 * _SAMPLE_ROWS:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._kept = len(self._sample[0])
            self._stride *= 2


def _thinned(
    x: np.ndarray, exact: np.ndarray | None, weights: np.ndarray, rows: slice
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Copies of some rows: a view would keep them all."""
    return x[rows].copy(), None if exact is None else exact[rows].copy(), weights[rows].copy()
