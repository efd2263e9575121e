"""How the verbs write: answers to standard output, notes to standard error, sizes and times as people read them."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mllm_edge.errors import WriteError

if TYPE_CHECKING:
    from mllm_edge.runtime.decode.scores import AnswerScore

__all__ = ["bytes_text", "milliseconds", "note", "print_json", "table", "write_answer", "write_shares"]

_STEP = 1000


def note(text: str = "") -> None:
    """A line on standard error."""
    click.echo(text, err=True)


def print_json(data: Any) -> None:
    """An object on standard output."""
    write_answer(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_answer(text: str) -> None:
    """Text on standard output at once, exactly as it is; a terminal gets no control characters."""
    if sys.stdout.isatty():  # an answer is untrusted text, and escape sequences drive terminals
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as e:
        if e.errno == errno.EPIPE:
            raise
        _give_up_stdout()
        raise WriteError(f"standard output: {e.strerror or e}", "free some space, or send the output elsewhere") from e


def write_shares(scores: "Sequence[AnswerScore]") -> None:
    """A line on standard output for each answer, its share before it, the likeliest first."""
    for score in sorted(scores, key=lambda score: -score.share):
        write_answer(f"{score.share:.3f}  {score.answer}\n")


def _give_up_stdout() -> None:
    """What is left in the buffer goes nowhere: the interpreter would fail once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right; an empty cell stays empty."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(_line(row, widths) for row in cells)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    columns = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(columns).rstrip()


def bytes_text(nbytes: int) -> str:
    """A size in decimal units: 999 B, 1.2 kB, 34.5 MB, 1.25 GB."""
    if nbytes < _STEP:
        return f"{nbytes} B"
    if nbytes < _STEP**2:
        return f"{nbytes / _STEP:.1f} kB"
    return f"{nbytes / _STEP**2:.1f} MB" if nbytes < _STEP**3 else f"{nbytes / _STEP**3:.2f} GB"


def milliseconds(seconds: float) -> str:
    """A time in milliseconds with three significant digits or more."""
    value = seconds * 1000
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
