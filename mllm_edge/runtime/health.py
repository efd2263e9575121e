"""How a model that is open for days fares: for a watchdog, a page of figures, a log."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from mllm_edge.errors import CancelledError, GivenUpError, TimedOutError

__all__ = ["Health", "Record", "State"]

State = Literal["ready", "busy", "closed"]


@dataclass(frozen=True)
class Health:
    """`state` of a model; how many calls wait; for how many seconds the one under way has run, its caller's time
    included, 0 without one. Of the calls that had their turn: those `done`, `failed`, and `stopped` (cancelled, timed
    out without an answer, abandoned, given up). `last_error`: of the last that failed. `resident`: bytes of memory that
    the process has, 0 where the system does not tell."""

    state: State
    waiting: int
    running: float
    done: int
    failed: int
    stopped: int
    last_error: str | None
    resident: int


class Record:
    """Counts of one model's calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: float | None = None
        self.done = self.failed = self.stopped = 0
        self.last_error: str | None = None

    @property
    def running(self) -> float:
        """Seconds since the call under way had its turn."""
        begun = self._begun
        return 0.0 if begun is None else time.perf_counter() - begun

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count the body as one call."""
        self._begun = time.perf_counter()
        try:
            yield
        except (GeneratorExit, CancelledError, GivenUpError, TimedOutError):
            self._count("stopped")
            raise
        except BaseException as error:
            self._count("failed")
            self.last_error = f"{type(error).__name__}: {error}"
            raise
        else:
            self._count("done")
        finally:
            self._begun = None

    def _count(self, what: Literal["done", "failed", "stopped"]) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)
