"""Work on large arrays piece by piece, on all CPUs: numpy lets go of the interpreter inside its loops."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["for_each_chunk"]

# Elements: float32 temporaries of this size stay in a core's cache, and the allocator gives them out again without
# asking the system for fresh pages, which costs more than the arithmetic.
_CHUNK = 1 << 18
_MOST_THREADS = 8


def for_each_chunk(rows: int, row: int, work: Callable[[int, int], None]) -> None:
    """Call `work(start, stop)` for ranges that cover `rows` rows of `row` elements, in any order, several at a time.

    The first exception that a call raises is raised here, after the calls under way have ended.
    """
    step = max(1, _CHUNK // max(1, row))
    starts = range(0, rows, step)
    threads = min(len(starts), _cpus())
    if threads <= 1:
        for start in starts:
            work(start, min(start + step, rows))
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda start: work(start, min(start + step, rows)), starts):
            pass


def _cpus() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_THREADS)
