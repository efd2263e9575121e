"""The threads that work inside one operator on the CPU: how many, where, and how long they wait awake."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mllm_edge.errors import OptionError
from mllm_edge.runtime.machine.cpu import physical_cores
from mllm_edge.runtime.numbers import whole

__all__ = ["Spin", "Threads"]

Spin = Literal["auto", "on", "off"]

_MOST = 1024
# A thread that waits spins, for then it is there sooner. Between two steps of an answer a token is sampled and written,
# which takes some 100 µs; between two operators of a run there is less. Who spins longer, as ONNX Runtime does by
# default, takes the core from others for nothing.
_STEP_US, _RUN_US = 200, 20
# The first version of ONNX Runtime that can be told how long.
_TIMED = (1, 26)
# Bytes of weights that one core reads within some 0.3 ms; sharing them out costs as much.
_SMALL = 4_000_000
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Threads:
    """`count` threads, the caller's among them; `affinity`: the CPUs that the others run on (empty: all).
    `chosen`: the count is the caller's wish, not this machine's cores."""

    count: int
    spin: Spin = "auto"
    affinity: tuple[int, ...] = ()
    chosen: bool = False

    @classmethod
    def of(
        cls, count: int | None = None, spin: Spin = "auto", affinity: str | Iterable[int] | None = None
    ) -> "Threads":
        """Checked. By default as many as there are physical cores, or CPUs in `affinity`. Raises OptionError."""
        if not isinstance(spin, str) or spin not in get_args(Spin):
            raise OptionError(f"spin must be auto, on or off, not {spin!r:.60}", "leave it out: auto suits most")
        places = () if affinity is None else _cpus(affinity)
        if count is None:
            return cls(len(places) or physical_cores(), spin, places)
        count = whole("threads", count, 1, _MOST)
        if places and count > len(places):
            raise OptionError(
                f"threads={count} are more than the CPUs of affinity, {_text(places)}",
                f"use {len(places)} threads, or name more CPUs",
            )
        return cls(count, spin, places, chosen=True)

    def for_graph(self, stepping: bool, nbytes: int) -> "Threads":
        """The threads for a graph with weights of so many bytes: one is enough for steps that are over sooner than
        others could be told of them, unless several were asked for."""
        alone = stepping and nbytes < _SMALL and not self.chosen and not self.affinity
        return replace(self, count=1) if alone else self

    def settings(self, stepping: bool, version: tuple[int, ...]) -> dict[str, str]:
        """Session options of ONNX Runtime `version` by name. `stepping`: the graph runs again and again, a step at a
        time, with little between; it is the only one for which it pays to be awake when the next run comes."""
        found = {}
        if self.affinity and self.count > 1:  # one entry for each thread but the caller's; the first CPU is 1
            places = ",".join(str(place + 1) for place in self.affinity)
            found["session.intra_op_thread_affinities"] = ";".join([places] * (self.count - 1))
        if self.spin == "off":
            return found | {"session.intra_op.allow_spinning": "0"}
        timed = version >= _TIMED
        if not stepping or (self.spin == "auto" and not timed):
            found["session.force_spinning_stop"] = "1"  # at each run's end
        if self.spin == "auto" and timed:
            found["session.intra_op.spin_duration_us"] = str(_STEP_US if stepping else _RUN_US)
        return found


def _cpus(affinity: Any) -> tuple[int, ...]:
    if isinstance(affinity, str):
        affinity = _parsed(affinity)
    try:
        given = list(affinity)
    except TypeError:
        raise _refused(affinity) from None
    most = os.cpu_count() or 1
    places = sorted({whole("a CPU of affinity", place, 0, most - 1) for place in given})
    if not places:
        raise _refused(affinity)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(most))
    if not allowed.issuperset(places):
        raise OptionError(
            f"affinity {_text(places)}: this process may not use {_text(sorted(set(places) - allowed))}",
            f"choose from {_text(sorted(allowed))}",
        )
    return tuple(places)


def _parsed(text: str) -> list[int]:
    """Numbers of a text such as "0,4-7"."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or len(part) > 20:
            raise _refused(text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise _refused(text)
        found += range(first, min(last, first + _MOST) + 1)
    return found


def _refused(affinity: Any) -> OptionError:
    return OptionError(
        f"affinity must be numbers of CPUs, not {affinity!r:.60}", "write them as 0,4-7 or [0, 4, 5, 6, 7]"
    )


def _text(places: Iterable[int]) -> str:
    return ",".join(map(str, places))
