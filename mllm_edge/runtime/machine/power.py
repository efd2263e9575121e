"""What a piece of work draws and how warm it makes the machine, sampled beside it."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mllm_edge.runtime.machine.nvml import NvidiaGpu, nvidia_gpus
from mllm_edge.runtime.machine.sensors import Rail, Sensors, find_sensors

__all__ = ["IDLE_SAMPLES", "Heat", "Idle", "PowerMeter", "PowerReading", "RailEnergy"]

IDLE_SAMPLES = 21  # 2 s: some GPUs tell the mean of the last second


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
class Idle:
    """The machine in the `seconds` before the work, in which the model was open and did nothing: the mean `watts` of
    the rails of the total, None where there is no total, and what `throttled` even then, as in `PowerReading`."""

    seconds: float
    samples: int
    watts: float | None
    throttled: tuple[str, ...] | None


@dataclass(frozen=True)
class PowerReading:
    """What was drawn in `seconds`, with everything else that the machine did meanwhile.

    `total`: the rails that add up to what `scope` draws: "board", "processor", "processor and GPU" or "GPU alone".
    `joules_per_token` and `joules_per_image` share their joules out, and those `above_idle` what is left without the
    power that the `idle` machine drew. They are None where there is no total or nothing to share among. `throttled`
    names what held clocks back; None where no sensor tells. `absent`: sentences about what could not be read.
    """

    rails: Mapping[str, RailEnergy]
    total: tuple[str, ...]
    scope: str
    seconds: float
    samples: int
    joules_per_token: float | None
    joules_per_image: float | None
    joules_per_token_above_idle: float | None
    joules_per_image_above_idle: float | None
    idle: Idle
    temperatures: Mapping[str, Heat]
    throttled: tuple[str, ...] | None
    absent: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


class PowerMeter:
    """Samples all sensors at the beginning and the end of every `with` block, and every `period` seconds in between.
    What lies between two blocks is not counted.

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
        self._idle: _Window | None = None
        self._work: _Window | None = None

    def watch_idle(self, samples: int = IDLE_SAMPLES) -> None:
        """Take so many samples while nothing is done, a period after each: to be called before the first block."""
        self._idle = _Window(self._find())
        for n in range(samples):
            self._idle.sample(self._clock())
            if n < samples - 1:
                self._wait(self._period)

    def __enter__(self) -> "PowerMeter":
        self._work = self._work or _Window(self._find())
        self._work.pause()
        self._ended.clear()
        self._work.sample(self._clock())
        self._thread = threading.Thread(target=self._watch, args=(self._work,), name="power", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        assert self._work is not None
        self._work.sample(self._clock())

    def reading(self, tokens: int, images: int) -> PowerReading:
        """What the finished blocks drew while they made `tokens` tokens of `images` images."""
        assert self._work is not None
        assert self._idle is not None
        work, idle = self._work, self._idle
        total = work.total
        joules = sum(work.rails[name].joules for name in total) if total else None
        watts = sum(idle.rails[name].energy.watts for name in total) if total and total == idle.total else None
        above = None if joules is None or watts is None else joules - watts * work.seconds
        return PowerReading(
            rails={name: tally.energy for name, tally in work.rails.items() if tally.seconds > 0},
            total=total,
            scope=work.sensors.scope if total else "",
            seconds=work.seconds,
            samples=work.samples,
            joules_per_token=_share(joules, tokens),
            joules_per_image=_share(joules, images),
            joules_per_token_above_idle=_share(above, tokens),
            joules_per_image_above_idle=_share(above, images),
            idle=Idle(idle.seconds, idle.samples, watts, idle.throttled),
            temperatures={name: Heat(tally.start, tally.peak) for name, tally in work.heat.items() if tally.readings},
            throttled=work.throttled,
            absent=(*work.sensors.absent, *work.failures()),
        )

    def _watch(self, window: "_Window") -> None:
        while not self._wait(self._period):
            window.sample(self._clock())


class _Window:
    """What the sensors told in the time that is measured."""

    def __init__(self, sensors: Sensors):
        self.sensors = sensors
        self.rails = {name: _RailTally(rail) for name, rail in sensors.rails.items()}
        self.heat = {name: _HeatTally(read) for name, read in sensors.temperatures.items()}
        self.samples, self.seconds = 0, 0.0
        self._last: float | None = None
        self._throttled: dict[str, None] = {}

    @property
    def total(self) -> tuple[str, ...]:
        """The rails of the total, if all of them answered all the time."""
        whole = {name for name, rail in self.rails.items() if math.isclose(rail.seconds, self.seconds, rel_tol=1e-6)}
        return self.sensors.total if self.seconds > 0 and whole.issuperset(self.sensors.total) else ()

    @property
    def throttled(self) -> tuple[str, ...] | None:
        return tuple(self._throttled) if self.sensors.throttles else None

    def sample(self, now: float) -> None:
        self.samples += 1
        self.seconds += 0.0 if self._last is None else now - self._last
        self._last = now
        for rail in self.rails.values():
            rail.add(now)
        for zone in self.heat.values():
            zone.add()
        self._throttled |= {name: None for name, told in self.sensors.throttles.items() if _told(told)}

    def pause(self) -> None:
        """What comes before the next sample does not count."""
        self._last = None
        for rail in self.rails.values():
            rail.last = None

    def failures(self) -> list[str]:
        tallies: dict[str, _RailTally | _HeatTally] = {**self.heat, **self.rails}
        failed = {name: tally.failed for name, tally in tallies.items() if tally.failed}
        return [f"{name}: {count} of {self.samples} readings failed" for name, count in failed.items()]


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


def _share(joules: float | None, count: int) -> float | None:
    return None if joules is None or not count else joules / count
