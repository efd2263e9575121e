"""What a piece of work draws and how warm it makes the machine, sampled beside it."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mllm_edge.runtime.nvml import NvidiaGpu, nvidia_gpus
from mllm_edge.runtime.sensors import Rail, Sensors, find_sensors

__all__ = ["Heat", "PowerMeter", "PowerReading", "RailEnergy"]


@dataclass(frozen=True)
class RailEnergy:
    """Mean watts, and joules, of one rail."""

    watts: float
    joules: float


@dataclass(frozen=True)
class Heat:
    """Of one zone, in °C."""

    start: float
    peak: float


@dataclass(frozen=True)
class PowerReading:
    """What was drawn in `seconds`, with everything else that the machine did meanwhile.

    `total`: the rails that add up to what the machine or its processors draw; `joules_per_token` and
    `joules_per_image` share their joules out, and are None where there is no total or nothing to share among.
    `throttled` is None where no sensor tells. `absent`: sentences about what could not be read.
    """

    rails: Mapping[str, RailEnergy]
    total: tuple[str, ...]
    seconds: float
    samples: int
    joules_per_token: float | None
    joules_per_image: float | None
    temperatures: Mapping[str, Heat]
    throttled: bool | None
    absent: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {
            "rails": {name: vars(rail) for name, rail in self.rails.items()},
            "total": list(self.total),
            "temperatures": {name: vars(heat) for name, heat in self.temperatures.items()},
            "absent": list(self.absent),
        }


class PowerMeter:
    """Samples all sensors at the beginning and the end of one `with` block, and every `period` seconds in between.

    `root`, `architecture` and `nvml` as in `find_sensors`; `clock` in seconds; `wait(period)` returns whether the
    block has ended.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        period: float = 0.1,
        *,
        architecture: str = "",
        nvml: Callable[[], tuple[NvidiaGpu, ...]] = nvidia_gpus,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], bool] | None = None,
    ):
        self._find = lambda: find_sensors(root, architecture, nvml)
        self._period, self._clock, self._ended = period, clock, threading.Event()
        self._wait = wait or self._ended.wait
        self._thread = threading.Thread(target=self._watch, name="power", daemon=True)

    def __enter__(self) -> "PowerMeter":
        self._sensors: Sensors = self._find()
        self._rails = {name: _RailTally(rail) for name, rail in self._sensors.rails.items()}
        self._heat = {name: _HeatTally(read) for name, read in self._sensors.temperatures.items()}
        self._throttled, self._samples = False, 0
        self._begin = self._end = self._clock()
        self._sample(self._begin)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._end = self._clock()
        self._sample(self._end)

    def reading(self, tokens: int, images: int) -> PowerReading:
        """What the finished block drew while it made `tokens` tokens of `images` images."""
        seconds = self._end - self._begin
        rails = {name: tally.energy for name, tally in self._rails.items() if tally.seconds > 0}
        whole = {name for name, tally in self._rails.items() if math.isclose(tally.seconds, seconds, rel_tol=1e-6)}
        total = self._sensors.total if whole.issuperset(self._sensors.total) else ()
        joules = sum(rails[name].joules for name in total)
        return PowerReading(
            rails=rails,
            total=total,
            seconds=seconds,
            samples=self._samples,
            joules_per_token=joules / tokens if total and tokens else None,
            joules_per_image=joules / images if total and images else None,
            temperatures={name: Heat(tally.start, tally.peak) for name, tally in self._heat.items() if tally.readings},
            throttled=self._throttled if self._sensors.throttles else None,
            absent=(*self._sensors.absent, *self._failures()),
        )

    def _watch(self) -> None:
        while not self._wait(self._period):
            self._sample(self._clock())

    def _sample(self, now: float) -> None:
        self._samples += 1
        for rail in self._rails.values():
            rail.add(now)
        for zone in self._heat.values():
            zone.add()
        self._throttled = self._throttled or any(_told(throttle) for throttle in self._sensors.throttles)

    def _failures(self) -> list[str]:
        tallies: dict[str, _RailTally | _HeatTally] = {**self._heat, **self._rails}
        failed = {name: tally.failed for name, tally in tallies.items() if tally.failed}
        return [f"{name}: {count} of {self._samples} readings failed" for name, count in failed.items()]


@dataclass
class _RailTally:
    """Joules in the `seconds` so far. A reading that fails is bridged by those around it."""

    rail: Rail
    joules: float = 0.0
    seconds: float = 0.0
    failed: int = 0
    last: tuple[float, float] | None = None

    @property
    def energy(self) -> RailEnergy:
        return RailEnergy(self.joules / self.seconds, self.joules)

    def add(self, now: float) -> None:
        try:
            value = self.rail.read()
        except (OSError, ValueError):
            self.failed += 1
            return
        if self.last is not None:
            then, before = self.last
            step = (value + before) / 2 * (now - then) if self.rail.wrap is None else (value - before) % self.rail.wrap
            self.joules, self.seconds = self.joules + step, self.seconds + now - then
        self.last = (now, value)


@dataclass
class _HeatTally:
    read: Callable[[], float]
    start: float = field(default=0.0)
    peak: float = field(default=0.0)
    readings: int = 0
    failed: int = 0

    def add(self) -> None:
        try:
            value = self.read()
        except (OSError, ValueError):
            self.failed += 1
            return
        self.start = self.start if self.readings else value
        self.peak = max(self.peak, value) if self.readings else value
        self.readings += 1


def _told(throttle: Callable[[], bool]) -> bool:
    try:
        return throttle()
    except (OSError, ValueError):
        return False
