"""Progress on standard error: bars on a terminal, one line a stage everywhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mllm_edge.cli.output import note

__all__ = ["StageBars", "StageLines", "stages"]

_LABEL = 40


class StageLines:
    """One line for each stage; `check` is called all the time and may raise to end the work."""

    def __init__(self, check: Callable[[], None] = lambda: None):
        self._check = check

    def stage(self, title: str, total: int = 0) -> None:
        """A new stage begins."""
        note(title)
        self._check()

    def advance(self, amount: int) -> None:
        """Some of the current stage is done."""
        self._check()

    def notice(self, text: str) -> None:
        """The user should know `text`."""
        note(f"note: {text}")

    def close(self) -> None:
        """The current stage is over, done or not."""

    def done(self) -> None:
        """The last stage is done."""


class StageBars:
    """A bar for a stage whose length is known, else its title and, at the end, the seconds it took."""

    def __init__(self, check: Callable[[], None] = lambda: None):
        self._check = check
        self._bar: Any = None
        self._began = 0.0
        self._open = False

    def stage(self, title: str, total: int = 0) -> None:
        """A new stage begins; the one before it is done."""
        self._fill()
        self.close()
        self._check()
        self._began, self._open = time.perf_counter(), True
        label = title.ljust(_LABEL)
        if total:
            self._bar = click.progressbar(length=total, label=label, file=sys.stderr, width=24)
            self._bar.render_progress()
        else:
            click.echo(label, nl=False, err=True)

    def advance(self, amount: int) -> None:
        """Some of the current stage is done."""
        if self._bar is not None:
            self._bar.update(amount)
        self._check()

    def notice(self, text: str) -> None:
        """The user should know `text`: on lines of its own, the stage goes on below."""
        if self._open:
            note()
        note(f"note: {text}")
        if self._bar is not None:
            self._bar.render_progress()

    def close(self) -> None:
        """The current stage is over, done or not."""
        if self._bar is not None:
            self._bar.render_finish()
        elif self._open:
            note(f"  {time.perf_counter() - self._began:.1f} s")
        self._bar, self._open = None, False

    def done(self) -> None:
        """The last stage is done."""
        self._fill()

    def _fill(self) -> None:
        """A total is an estimate: a stage that is done is full."""
        if self._bar is not None:
            self._bar.update(self._bar.length - self._bar.pos)


@contextmanager
def stages(check: Callable[[], None] = lambda: None) -> Iterator[StageBars | StageLines]:
    """The progress that fits standard error."""
    progress = StageBars(check) if sys.stderr.isatty() else StageLines(check)
    try:
        yield progress
        progress.done()
    finally:
        progress.close()
