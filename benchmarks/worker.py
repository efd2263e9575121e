"""A decoder in a process of its own that loads once and answers measurements on its standard streams.

Both sides of a comparison run `serve`, so that the same lines take the time. Only the standard library is used here:
a peer's environment has nothing of this package's.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Engine", "Measurement", "Memory", "Worker", "answer_lines", "checked_run", "serve"]

# The first steps after a prompt find cold caches and sleeping threads.
WARM_STEPS = 4
_ROOT = Path(__file__).parents[1]


class Engine(Protocol):
    """One sequence of a loaded decoder."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget the sequence, run a prompt and choose its first token."""
        ...

    def step(self) -> None:
        """Run the token chosen last and choose the next one, the most probable."""
        ...

    def logits(self, ids: Sequence[int]) -> Sequence[float]:
        """Logits [V] behind a prompt of its own."""
        ...


@dataclass(frozen=True)
class Measurement:
    """Seconds until the first token and the median seconds of a step (0 without steps)."""

    prefill: float
    step: float


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes: the largest it ever was, and what of today's is not backed by a file."""

    peak: int
    anonymous: int


def serve(open_engine: Callable[[], Engine]) -> None:
    """Answer requests {ids, steps, logits} from standard input until it ends."""
    answer_lines(lambda: partial(_answer, open_engine()))


def answer_lines(open_answers: Callable[[], Callable[[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
    """Answer requests from standard input, one JSON document a line, until it ends."""
    # Libraries may print: answers go to a copy of standard output, and everything else to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer = open_answers()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def _answer(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    if request["logits"]:
        return {"logits": [float(x) for x in engine.logits(request["ids"])]}
    prefill = _seconds(lambda: engine.prefill(request["ids"]))
    steps = [_seconds(engine.step) for _ in range(WARM_STEPS + request["steps"])] if request["steps"] else []
    return {"prefill": prefill, "step": statistics.median(steps[WARM_STEPS:]) if steps else 0.0}


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Worker:
    """The measuring side of a process that runs `serve` or `answer_lines`. Between requests the process is stopped: it
    takes no core."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path):
        self.name, self._log = name, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_ROOT,
            )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to a request."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and that is reported
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def measure(self, ids: Sequence[int], steps: int) -> Measurement:
        """Run a prompt and then `steps` tokens."""
        answer = self.ask({"ids": list(ids), "steps": steps, "logits": False})
        return Measurement(answer["prefill"], answer["step"])

    def logits(self, ids: Sequence[int]) -> list[float]:
        """Logits [V] behind a prompt."""
        return self.ask({"ids": list(ids), "steps": 0, "logits": True})["logits"]

    def memory(self) -> Memory:
        """From the kernel's own count, which starts anew with the program (`ru_maxrss` is inherited)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        peak, anonymous = (int(found[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
        return Memory(peak, anonymous)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended\n{self._log.read_text(errors='replace')[-2000:]}")
        self._process.send_signal(signal.SIGSTOP)
        # The signal works when the process is next scheduled: nobody else may be measured before that.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return json.loads(line)


def checked_run(command: Sequence[str | Path], failure: str) -> None:
    """Run a command of an environment, without the hub; raises SystemExit with its last words."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{failure}\n{done.stdout[-2000:]}")
