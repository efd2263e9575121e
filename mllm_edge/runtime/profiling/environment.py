"""What a measurement depends on beside the bundle: the CPU and its clocks, its load, versions."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import mllm_edge
from mllm_edge.runtime.machine.cpu import cpu_name, physical_cores
from mllm_edge.runtime.machine.hardware import read_machine

__all__ = ["Clock", "Environment", "read_clocks", "read_environment", "versions"]

# Distributions that hold a backend's engine, by the backend's name; the first that is installed is told.
_ENGINES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
    "tensorrt-10.3": ("tensorrt",),
}


@dataclass(frozen=True)
class Clock:
    """A frequency policy of the CPU: the `cpus` that share it, its governor, frequencies in Hz (None: not told).

    `current_hz` is what it was before the measurement.
    """

    cpus: tuple[int, ...]
    governor: str
    minimum_hz: float | None
    maximum_hz: float | None
    current_hz: float | None


@dataclass(frozen=True)
class Environment:
    """The machine before a measurement; None and "" for what the system does not tell, sizes in bytes.

    `cores`: physical ones that this process may use. `affinity`: the CPUs it may use. `load_average`: over 1, 5
    and 15 minutes. `clocks` is empty where the system has no frequency policies, as in most virtual machines.
    """

    processor: str
    architecture: str
    system: str
    cores: int
    memory: int
    board: str
    gpus: tuple[str, ...]
    affinity: tuple[int, ...] | None
    load_average: tuple[float, ...] | None
    clocks: tuple[Clock, ...]


def read_environment(root: Path = Path("/")) -> Environment:
    """The machine as it is now; its files are read below `root`."""
    machine = read_machine(root)
    return Environment(
        processor=cpu_name(),
        architecture=machine.architecture,
        system=f"{platform.system()} {platform.release()}",
        cores=physical_cores(),
        memory=machine.memory,
        board=machine.board,
        gpus=tuple(gpu.name for gpu in machine.gpus),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None,
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        clocks=read_clocks(root),
    )


def read_clocks(root: Path = Path("/")) -> tuple[Clock, ...]:
    """The frequency policies below `root`, by their numbers."""
    folders = root.glob("sys/devices/system/cpu/cpufreq/policy[0-9]*")
    return tuple(_clock(folder) for folder in sorted(folders, key=lambda p: int(p.name.removeprefix("policy"))))


def versions(backend: str) -> dict[str, str]:
    """Of this package, Python, numpy and the backend's engine, by their names."""
    found = {"mllm-edge": mllm_edge.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in _ENGINES.get(backend, ()):
        try:
            return {**found, name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return found


def _clock(folder: Path) -> Clock:
    cpus = tuple(int(cpu) for cpu in _text(folder / "affected_cpus").split() if cpu.isdigit())
    return Clock(
        cpus=cpus,
        governor=_text(folder / "scaling_governor"),
        minimum_hz=_hz(folder / "scaling_min_freq"),
        maximum_hz=_hz(folder / "scaling_max_freq"),
        current_hz=_hz(folder / "scaling_cur_freq"),
    )


def _hz(path: Path) -> float | None:
    """A frequency that the file gives in kHz."""
    text = _text(path)
    return 1000.0 * int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
