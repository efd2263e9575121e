"""Rows that are decided one after another, each in the light of those before it."""

from collections.abc import Callable

import numpy as np

__all__ = ["decide_rows"]

_FEW = 8  # rows that follow each other's decisions one by one; more of them wait for a matrix product


def decide_rows(
    values: np.ndarray, coupling: np.ndarray, decide: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """What `decide(i, row)` says of each row [N] of `values` [K, N] from which coupling[i, j] times the decisions about
    all rows j < i was taken; [K, N] float32. `coupling` [K, K]; `values` are used up."""
    decided = np.empty(values.shape, np.float32)
    buffer = np.empty((_FEW, values.shape[1]), np.float32)

    def some(start: int, stop: int) -> None:
        if stop - start > _FEW:
            middle = (start + stop) // 2
            some(start, middle)
            values[middle:stop] -= coupling[middle:stop, start:middle] @ decided[start:middle]
            some(middle, stop)
            return
        for i in range(start, stop):
            decided[i] = decide(i, values[i])
            behind = coupling[i + 1 : stop, i, None]
            values[i + 1 : stop] -= np.multiply(behind, decided[i], out=buffer[: len(behind)])

    some(0, len(values))
    return decided
