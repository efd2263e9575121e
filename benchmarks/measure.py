"""Work in a process of its own: how long it takes and how much memory."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mllm_edge.runtime.machine.cpu import peak_rss

__all__ = ["Measured", "in_process"]


@dataclass(frozen=True)
class Measured:
    """Wall seconds, peak RSS in GB, and what the work returned."""

    seconds: float
    peak: float
    result: Any


def in_process(work: Callable[..., Any], *arguments: Any) -> Measured:
    """Run `work` in a fresh process; both must be importable. Raises SystemExit when it fails."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        measured: Measured = receive.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed") from None
    process.join()
    return measured


def _run(send: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    begin = time.perf_counter()
    result = work(*arguments)
    seconds = time.perf_counter() - begin
    send.send(Measured(seconds, peak_rss() / 1e9, result))
