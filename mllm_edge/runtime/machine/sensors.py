"""The power, heat and throttling sensors of a machine, from files below a root and from NVML.

What is absent or cannot be read is told in a sentence with what helps, and never replaced by a guess.
"""

import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mllm_edge.runtime.machine.nvml import NvidiaGpu, nvidia_gpus

__all__ = ["Rail", "Sensors", "find_sensors"]

# The rails that make up what a board draws, by its documentation; the first set that is there counts.
_TOTALS = (
    ("VIN",),  # Thor's developer kit: module and carrier board
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX: the module's input
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin: VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0
)


@dataclass(frozen=True)
class Rail:
    """`read`: watts now; where `wrap` is given, joules since whenever, which start again at `wrap`.

    `read` raises OSError or ValueError when it fails.
    """

    read: Callable[[], float]
    wrap: float | None = None


@dataclass
class Sensors:
    """What this machine has, by name. `total`: the rails that add up to what `scope` draws: "board", "processor",
    "processor and GPU" or "GPU alone"; none, and "", where that is not known.

    `temperatures` in °C; `throttles` are true while clocks are held back, or once they were since they were found.
    """

    rails: dict[str, Rail] = field(default_factory=dict)
    temperatures: dict[str, Callable[[], float]] = field(default_factory=dict)
    throttles: dict[str, Callable[[], bool]] = field(default_factory=dict)
    total: tuple[str, ...] = ()
    scope: str = ""
    absent: list[str] = field(default_factory=list)


def find_sensors(
    root: Path = Path("/"), architecture: str = "", nvml: Callable[[], tuple[NvidiaGpu, ...]] = nvidia_gpus
) -> Sensors:
    """The sensors of the machine whose system files lie below `root`, each read once to see that it works."""
    sensors = Sensors()
    _board(root, sensors)
    board = bool(sensors.rails)
    _cpu(root, architecture or platform.machine(), sensors)
    _gpus(nvml, board, sensors)
    _heat(root, sensors)
    _throttling(root, sensors)
    if not sensors.throttles:
        sensors.absent.append("throttling: nothing on this machine tells of it")
    return sensors


def _board(root: Path, sensors: Sensors) -> None:
    """Rails of the INA monitors of a Jetson."""
    found = False
    for name, path, read in (*_hwmon_rails(root), *_iio_rails(root)):
        found = True
        if _works(root, sensors, name, path, read):
            sensors.rails[name] = Rail(read)
    if not found:
        sensors.absent.append("board power: no INA3221 below /sys/class/hwmon (Jetson boards have one)")
        return
    sensors.total = next((names for names in _TOTALS if all(name in sensors.rails for name in names)), ())
    if sensors.total:
        sensors.scope = "board"
    else:
        names = ", ".join(sensors.rails) or "none"
        sensors.absent.append(f"total power: the rails that can be read ({names}) are not known to add up to it")


def _hwmon_rails(root: Path) -> Iterator[tuple[str, Path, Callable[[], float]]]:
    for chip in _numbered(root / "sys/class/hwmon", "hwmon*"):
        kind = _text(chip / "name")
        for channel in "123" if kind == "ina3221" else "":
            label, current = _text(chip / f"in{channel}_label"), chip / f"curr{channel}_input"
            if label not in ("", "NC") and current.exists():  # NC: not connected
                yield label, current, _product(chip / f"in{channel}_input", current)
        label = _text(chip / "label") or _text(chip / "in1_label")
        if kind == "ina238" and label:  # one channel
            yield label, chip / "power1_input", _scaled(chip / "power1_input", 1e-6)


def _iio_rails(root: Path) -> Iterator[tuple[str, Path, Callable[[], float]]]:
    """The driver of L4T 32 and older."""
    for chip in _numbered(root / "sys/bus/iio/devices", "iio:device*"):
        for file in _numbered(chip, "rail_name_*"):
            power = chip / f"in_power{file.name.removeprefix('rail_name_')}_input"
            if _text(file) not in ("", "NC") and power.exists():
                yield _text(file), power, _scaled(power, 1e-3)


def _cpu(root: Path, architecture: str, sensors: Sensors) -> None:
    """Energy counters of x86 CPUs (RAPL). The memory's counter is not part of the package's."""
    if architecture.lower() not in ("x86_64", "amd64", "i686"):
        sensors.absent.append(f"RAPL: not an x86 processor ({architecture})")
        return
    zones = _numbered(root / "sys/class/powercap", "intel-rapl:*")
    if not zones:
        sensors.absent.append(
            "RAPL: no intel-rapl below /sys/class/powercap; a virtual machine has none, elsewhere: "
            "sudo modprobe intel_rapl_msr"
        )
    for zone in zones:
        name, package = _text(zone / "name"), zone.parent / zone.name.rpartition(":")[0]
        inner = zone.name.count(":") == 2
        full, energy = f"{_text(package / 'name')} {name}" if inner else name, zone / "energy_uj"
        read = _scaled(energy, 1e-6)
        if not _works(root, sensors, f"RAPL {full}", energy, read, "/sys/class/powercap/intel-rapl:*/energy_uj"):
            continue
        wrap = _scaled(zone / "max_energy_range_uj", 1e-6)
        if _works(root, sensors, f"RAPL {full}", zone / "max_energy_range_uj", wrap):
            sensors.rails[full] = Rail(read, wrap())
            if name.startswith("package") or name == "dram":
                sensors.total, sensors.scope = (*sensors.total, full), "processor"


def _gpus(nvml: Callable[[], tuple[NvidiaGpu, ...]], board: bool, sensors: Sensors) -> None:
    """GPUs by NVML. Where the board has rails, those have the GPU's power too."""
    try:
        gpus = nvml()
    except OSError as e:
        sensors.absent.append(f"NVML: {e}; install the NVIDIA driver if there is a GPU")
        return
    for gpu in gpus:
        if _answers(sensors, f"{gpu.name} power", gpu.power):
            sensors.rails[gpu.name] = Rail(gpu.power)
            if not board:
                scope = "processor and GPU" if "processor" in sensors.scope else "GPU alone"
                sensors.total, sensors.scope = (*sensors.total, gpu.name), scope
        if _answers(sensors, f"{gpu.name} temperature", gpu.temperature):
            sensors.temperatures[gpu.name] = gpu.temperature
        if _answers(sensors, f"{gpu.name} throttling", gpu.throttled):
            sensors.throttles[gpu.name] = gpu.throttled


def _heat(root: Path, sensors: Sensors) -> None:
    """Thermal zones. The kernel slows a processor down from a zone's passive trip point on."""
    zones = _numbered(root / "sys/class/thermal", "thermal_zone*")
    if not zones:
        sensors.absent.append("temperatures: no thermal zone below /sys/class/thermal; a virtual machine has none")
    kinds = Counter(_text(zone / "type") for zone in zones)
    for zone in zones:
        name = _text(zone / "type")
        name = name if kinds[name] == 1 else f"{name} {zone.name.removeprefix('thermal_zone')}"
        read = _celsius(zone / "temp")
        if not _works(root, sensors, f"temperature {name}", zone / "temp", read):
            continue
        sensors.temperatures[name] = read
        trips = [trip for trip in zone.glob("trip_point_*_type") if _text(trip) == "passive"]
        limits = [_text(trip.with_name(trip.name.replace("_type", "_temp"))) for trip in trips]
        hot = [int(limit) / 1000 for limit in limits if limit.isdigit() and int(limit)]
        sensors.throttles |= {f"{name} at {limit:g} °C": _reaches(read, limit) for limit in hot}


def _throttling(root: Path, sensors: Sensors) -> None:
    """Alerts of the Jetson's firmware, its over-current events, and the counters of Intel CPUs."""
    system = root / "sys"
    for device in _numbered(system / "class/thermal", "cooling_device*"):
        alert, state = _text(device / "type"), device / "cur_state"
        if alert.endswith("throttle-alert") and _text(state).isdigit():
            sensors.throttles[alert] = _reaches(_scaled(state), 1)
    chips = [chip for chip in _numbered(system / "class/hwmon", "hwmon*") if _text(chip / "name") == "soctherm_oc"]
    counters = {
        f"over-current {file.name.removesuffix('_event_cnt')}": file
        for chip in chips
        for file in sorted(chip.glob("oc*_event_cnt"))
    }
    for name, file in {**counters, **_cpu_counters(system / "devices/system/cpu")}.items():
        if _text(file).isdigit():
            sensors.throttles[name] = _reaches(_scaled(file), int(_text(file)) + 1)


def _cpu_counters(folder: Path) -> dict[str, Path]:
    """One counter of each package and of each core: every CPU in them shows the same."""
    found: dict[str, Path] = {}
    for cpu in _numbered(folder, "cpu[0-9]*"):
        topology, number = cpu / "topology", cpu.name.removeprefix("cpu")
        package = f"package {_text(topology / 'physical_package_id') or number}"
        core = f"core {_text(topology / 'core_cpus_list') or number}"
        for name, file in ((package, "package_throttle_count"), (core, "core_throttle_count")):
            if (cpu / "thermal_throttle" / file).exists():
                found.setdefault(name, cpu / "thermal_throttle" / file)
    return found


def _works(root: Path, sensors: Sensors, name: str, path: Path, read: Callable[[], float], grant: str = "") -> bool:
    """Whether it can be read; else what stands in the way is noted. `grant`: the files to be allowed together."""
    shown = f"/{path.relative_to(root).as_posix()}"
    try:
        read()
    except BlockingIOError:  # it has no answer at the moment, as the zone of a GPU that is switched off
        return True
    except PermissionError:
        note = f"{name}: no permission to read {shown}: sudo chmod a+r {grant or shown}"
    except (OSError, ValueError) as e:
        note = f"{name}: {shown} cannot be read: {getattr(e, 'strerror', None) or e}"
    else:
        return True
    sensors.absent.append(note)
    return False


def _answers(sensors: Sensors, name: str, read: Callable[[], object]) -> bool:
    try:
        read()
    except OSError as e:
        sensors.absent.append(f"{name}: NVML says: {e}")
        return False
    return True


def _scaled(path: Path, unit: float = 1.0) -> Callable[[], float]:
    return lambda: _integer(path) * unit


def _product(millivolts: Path, milliamperes: Path) -> Callable[[], float]:
    return lambda: _integer(millivolts) * _integer(milliamperes) * 1e-6


def _celsius(path: Path) -> Callable[[], float]:
    def read() -> float:
        value = _integer(path) / 1000
        if value < -100:
            raise ValueError(f"{value:g} °C, which says that the sensor is off")
        return value

    return read


def _integer(path: Path) -> int:
    """Not by a file object: those raise TypeError where a sensor answers "try again"."""
    file = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(file, 64))
    finally:
        os.close(file)


def _reaches(read: Callable[[], float], limit: float) -> Callable[[], bool]:
    return lambda: read() >= limit


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """By the numbers in their names, since hwmon10 comes after hwmon2."""
    return sorted(folder.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""
