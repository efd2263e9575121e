"""Calls that end early: because any thread says so, or because their time is over."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mllm_edge.errors import CancelledError, OptionError, TimedOutError
from mllm_edge.runtime.numbers import number

__all__ = ["Cancel", "Stopping"]

_LONGEST = 1e9  # seconds


class Cancel:
    """Ends calls from any thread: hand it to them as `cancel`, and call `cancel()` once, from where you are.

    They raise CancelledError before their next run of a component, piece of the prompt, or token, and while they wait
    for others; later calls with it do so at once.
    """

    def __init__(self) -> None:
        self._lock, self._waiting = threading.Lock(), list[Callable[[], None]]()
        self._cancelled = False

    def __repr__(self) -> str:
        return f"Cancel({'cancelled' if self._cancelled else ''})"

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the calls that have this value; a second time nothing happens."""
        with self._lock:
            self._cancelled = True
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within, `wake` is called when `cancel` is, at once where it was before."""
        with self._lock:
            before = self._cancelled
            if not before:
                self._waiting.append(wake)
        if before:
            wake()
        try:
            yield
        finally:
            with self._lock:
                self._waiting = [other for other in self._waiting if other is not wake]


class Stopping:
    """When one call is to end, whatever it has done by then: `check` raises CancelledError or TimedOutError from the
    moment on that `cancel` is called, or `timeout` seconds from now."""

    def __init__(self, cancel: Any = None, timeout: Any = None):
        """Raises OptionError for what is neither."""
        if cancel is not None and not isinstance(cancel, Cancel):
            raise OptionError(f"cancel must be a Cancel, not {cancel!r:.60}", "pass mllm_edge.Cancel()")
        self._cancel = cancel
        self._seconds = None if timeout is None else number("timeout", timeout, 0, _LONGEST, above=True)
        self._end = None if self._seconds is None else time.perf_counter() + self._seconds

    def check(self) -> None:
        """Raise what ends the call, if anything does."""
        if self._cancel is not None and self._cancel.cancelled:
            raise CancelledError("the call was cancelled", "ask again, with another Cancel()")
        if self._end is not None and time.perf_counter() >= self._end:
            raise TimedOutError(f"the call was not done in {self._seconds:g} s", "give it more: timeout=…")

    @contextmanager
    def waiting(self, wake: Callable[[], None]) -> Iterator[float]:
        """Around a wait, which `wake` ends: for how many seconds it may be, −1 for as long as it takes."""
        left = -1.0 if self._end is None else max(self._end - time.perf_counter(), 0.0)
        if self._cancel is None:
            yield left
        else:
            with self._cancel.waking(wake):
                yield left
