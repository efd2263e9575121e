"""Power and heat, from made-up system files and a clock that the tests turn.

The trees of the boards are not recordings. Rails are named as in the kernel's device trees (Orin) and as users report
them (Thor, Nano), units are those of the kernel's documentation of ina3221 and ina238; the numbers are invented.
"""

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_edge.runtime.machine import sensors as sensors_module
from mllm_edge.runtime.machine.nvml import NvidiaGpu, nvidia_gpus
from mllm_edge.runtime.machine.power import Heat, Idle, PowerMeter, PowerReading, RailEnergy
from mllm_edge.runtime.machine.sensors import find_sensors

HWMON, THERMAL, RAPL = "sys/class/hwmon", "sys/class/thermal", "sys/class/powercap"


def _ina3221(chip: int, rails: Mapping[int, tuple[str, int, int]]) -> dict[str, str]:
    """Channel → label, mV, mA."""
    folder = f"{HWMON}/hwmon{chip}"
    files = {f"{folder}/name": "ina3221\n", f"{folder}/in7_label": "sum of shunt voltages\n"}
    files |= {f"{folder}/in7_input": "1240\n", f"{folder}/curr4_input": "1600\n"}
    for channel, (label, millivolts, milliamperes) in rails.items():
        files[f"{folder}/in{channel}_label"] = f"{label}\n"
        files[f"{folder}/in{channel}_input"] = f"{millivolts}\n"
        files[f"{folder}/curr{channel}_input"] = f"{milliamperes}\n"
    return files


def _zone(number: int, kind: str, millidegrees: str, passive: int = 99000) -> dict[str, str]:
    folder = f"{THERMAL}/thermal_zone{number}"
    files = {f"{folder}/type": f"{kind}\n", f"{folder}/temp": f"{millidegrees}\n"}
    for trip, (name, limit) in enumerate({"active": 40000, "passive": passive, "critical": 104500}.items()):
        files |= {f"{folder}/trip_point_{trip}_type": f"{name}\n", f"{folder}/trip_point_{trip}_temp": f"{limit}\n"}
    return files


ORIN_NANO = {
    **_ina3221(1, {1: ("VDD_IN", 5000, 1200), 2: ("VDD_CPU_GPU_CV", 5000, 300), 3: ("VDD_SOC", 5000, 280)}),
    **_zone(0, "cpu-thermal", "48500"),
    **_zone(1, "gpu-thermal", "47000"),
    **_zone(2, "cv0-thermal", "-256000"),
    f"{HWMON}/hwmon3/name": "soctherm_oc\n",
    **{f"{HWMON}/hwmon3/oc{n}_event_cnt": f"{n}\n" for n in (1, 2, 3)},
    f"{THERMAL}/cooling_device0/type": "pwm-fan\n",
    f"{THERMAL}/cooling_device0/cur_state": "3\n",
    f"{THERMAL}/cooling_device1/type": "cpu-throttle-alert\n",
    f"{THERMAL}/cooling_device1/cur_state": "0\n",
}
AGX_ORIN = {
    **_ina3221(3, {1: ("VDD_GPU_SOC", 20000, 160), 2: ("VDD_CPU_CV", 20000, 40), 3: ("VIN_SYS_5V0", 5000, 900)}),
    **_ina3221(4, {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5000, 100), 3: ("NC", 0, 0)}),
    **_zone(0, "tj-thermal", "51000"),
}
_MODULE = {1: ("VDD_GPU", 20000, 0), 2: ("VDD_CPU_SOC_MSS", 20000, 325), 3: ("VIN_SYS_5V0", 5000, 1300)}
THOR = {
    **_ina3221(0, _MODULE),
    f"{HWMON}/hwmon10/name": "ina238\n",
    f"{HWMON}/hwmon10/label": "VIN\n",
    f"{HWMON}/hwmon10/power1_input": "23000000\n",  # µW
    **_zone(0, "tj-thermal", "55100", passive=109000),
}
NANO = {  # L4T 32: the driver of before hwmon
    f"sys/bus/iio/devices/iio:device0/{name}": text
    for n, (rail, milliwatts) in enumerate({"POM_5V_IN": 2200, "POM_5V_GPU": 40, "POM_5V_CPU": 400}.items())
    for name, text in {f"rail_name_{n}": f"{rail}\n", f"in_power{n}_input": f"{milliwatts}\n"}.items()
}
DESKTOP = {
    **{
        f"{RAPL}/{zone}/{file}": text
        for zone, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}.items()
        for file, text in {"name": name, "energy_uj": "1000000\n", "max_energy_range_uj": "5000000\n"}.items()
    },
    f"{THERMAL}/thermal_zone0/type": "acpitz\n",
    f"{THERMAL}/thermal_zone0/temp": "30000\n",
    f"{THERMAL}/thermal_zone1/type": "acpitz\n",
    f"{THERMAL}/thermal_zone1/temp": "31000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7\n",
}
JETSON, X86 = "aarch64", "x86_64"


def _write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def _no_nvml() -> tuple[NvidiaGpu, ...]:
    raise OSError("libnvidia-ml.so.1: no such file")


class Time:
    """A clock of which each waiting takes the period; the steps run while others wait."""

    def __init__(self, *steps: Callable[[], object]):
        self.now, self._steps = 100.0, iter(steps)

    def clock(self) -> float:
        return self.now

    def wait(self, period: float) -> bool:
        """Whether no step is left; the last wait ends the block, half a period later."""
        step = next(self._steps, None)
        self.now += period if step else period / 2
        if step:
            step()
        return step is None


def _measure(
    root: Path,
    *steps: Callable[[], object],
    architecture: str = JETSON,
    nvml: Callable[[], tuple[NvidiaGpu, ...]] = _no_nvml,
    tokens: int = 10,
    images: int = 2,
    idle: Sequence[Callable[[], object]] = (),
) -> PowerReading:
    time = Time(*idle, *steps)
    meter = PowerMeter(root, 2.0, architecture=architecture, nvml=nvml, clock=time.clock, wait=time.wait)
    meter.watch_idle(len(idle) + 1)
    with meter:
        pass
    return meter.reading(tokens, images)


def _set(root: Path, name: str, text: str) -> Callable[[], object]:
    return lambda: (root / name).write_text(text)


# ---------------------------------------------------------------- boards
@pytest.mark.parametrize(
    ("tree", "rails", "total"),
    [
        (ORIN_NANO, {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.5, "VDD_SOC": 1.4}, ("VDD_IN",)),
        (
            AGX_ORIN,
            {"VDD_GPU_SOC": 3.2, "VDD_CPU_CV": 0.8, "VIN_SYS_5V0": 4.5, "VDDQ_VDD2_1V8AO": 0.5},
            ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        ),
        (THOR, {"VDD_GPU": 0.0, "VDD_CPU_SOC_MSS": 6.5, "VIN_SYS_5V0": 6.5, "VIN": 23.0}, ("VIN",)),
        (NANO, {"POM_5V_IN": 2.2, "POM_5V_GPU": 0.04, "POM_5V_CPU": 0.4}, ("POM_5V_IN",)),
    ],
    ids=["Orin Nano", "AGX Orin", "Thor", "Nano"],
)
def test_the_rails_of_a_board(
    tmp_path: Path, tree: Mapping[str, str], rails: Mapping[str, float], total: tuple[str, ...]
) -> None:
    reading = _measure(_write(tmp_path, tree))
    assert {name: rail.watts for name, rail in reading.rails.items()} == pytest.approx(rails)
    assert (reading.total, reading.scope) == (total, "board")
    watts = sum(rails[name] for name in total)
    assert (reading.joules_per_token, reading.joules_per_image) == pytest.approx((watts / 10, watts / 2))
    assert (reading.seconds, reading.samples) == (1.0, 2)


def test_thor_without_its_carrier_boards_monitor_has_no_total(tmp_path: Path) -> None:
    reading = _measure(_write(tmp_path, {n: t for n, t in THOR.items() if "hwmon10" not in n}))
    assert set(reading.rails) == {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}
    assert (reading.total, reading.joules_per_token, reading.joules_per_image) == ((), None, None)
    assert reading.scope == ""
    names = "VDD_GPU, VDD_CPU_SOC_MSS, VIN_SYS_5V0"
    assert f"total power: the rails that can be read ({names}) are not known to add up to it" in reading.absent


def test_a_missing_rail_leaves_no_total(tmp_path: Path) -> None:
    root = _write(tmp_path, AGX_ORIN | {f"{HWMON}/hwmon3/curr2_input": "nonsense"})
    reading = _measure(root)
    assert "VDD_CPU_CV" not in reading.rails
    assert (reading.total, reading.joules_per_token) == ((), None)
    assert any(note.startswith(f"VDD_CPU_CV: /{HWMON}/hwmon3/curr2_input cannot be read") for note in reading.absent)


# ---------------------------------------------------------------- energy
def test_energy_is_the_area_below_the_samples(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    current = f"{HWMON}/hwmon1/curr1_input"
    reading = _measure(root, _set(root, current, "2000"), _set(root, current, "1000"))
    # 6 W, 2 s later 10 W, 2 s later 5 W, and still so 1 s later
    joules = 2 * (6 + 10) / 2 + 2 * (10 + 5) / 2 + 1 * 5
    assert reading.rails["VDD_IN"] == RailEnergy(pytest.approx(joules / 5), pytest.approx(joules))
    assert (reading.seconds, reading.samples) == (5.0, 4)
    assert reading.joules_per_token == pytest.approx(joules / 10)


def test_counters_start_again(tmp_path: Path) -> None:
    root = _write(tmp_path, DESKTOP)
    counter = f"{RAPL}/intel-rapl:0/energy_uj"
    reading = _measure(root, _set(root, counter, "4900000"), _set(root, counter, "300000"), architecture=X86)
    assert reading.rails["package-0"] == RailEnergy(pytest.approx(4.3 / 5), pytest.approx(3.9 + 0.4))
    assert set(reading.rails) == {"package-0", "package-0 core", "package-0 dram"}
    assert (reading.total, reading.scope) == (("package-0", "package-0 dram"), "processor")


def test_a_reading_that_fails_is_bridged_and_told(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    current = f"{HWMON}/hwmon1/curr1_input"
    reading = _measure(root, _set(root, current, ""), _set(root, current, "2000"))
    assert reading.rails["VDD_IN"].joules == pytest.approx(4 * (6 + 10) / 2 + 1 * 10)
    assert "VDD_IN: 1 of 4 readings failed" in reading.absent
    assert reading.joules_per_token is not None


def test_a_rail_that_falls_silent_makes_no_total(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    reading = _measure(root, lambda: None, _set(root, f"{HWMON}/hwmon1/in1_input", ""))
    assert reading.rails["VDD_IN"].joules == pytest.approx(12.0)  # of the first 2 s of 5
    assert (reading.total, reading.joules_per_token) == ((), None)
    assert "VDD_IN: 2 of 4 readings failed" in reading.absent


def test_nothing_to_share_among(tmp_path: Path) -> None:
    reading = _measure(_write(tmp_path, ORIN_NANO), tokens=0, images=0)
    assert (reading.joules_per_token, reading.joules_per_image) == (None, None)


def test_the_default_clock_and_thread_end_with_the_block(tmp_path: Path) -> None:
    meter = PowerMeter(_write(tmp_path, ORIN_NANO), 1e-4, architecture=JETSON, nvml=_no_nvml)
    meter.watch_idle(2)
    with meter:
        while meter._work.samples < 5:
            pass
    reading = meter.reading(1, 0)
    assert reading.samples >= 6
    assert not meter._thread.is_alive()
    assert reading.rails["VDD_IN"].watts == pytest.approx(6.0)


def test_what_lies_between_two_blocks_is_not_counted(tmp_path: Path) -> None:
    root, time = _write(tmp_path, ORIN_NANO), Time()
    meter = PowerMeter(root, 2.0, architecture=JETSON, nvml=_no_nvml, clock=time.clock, wait=time.wait)
    meter.watch_idle(1)
    with meter:  # 6 W for 1 s
        pass
    time.now += 100
    _set(root, f"{HWMON}/hwmon1/curr1_input", "2000")()
    with meter:  # 10 W for 1 s
        pass
    reading = meter.reading(10, 0)
    assert reading.rails["VDD_IN"] == RailEnergy(pytest.approx(8.0), pytest.approx(16.0))
    assert (reading.seconds, reading.samples, reading.joules_per_token) == (2.0, 4, pytest.approx(1.6))


def test_what_the_idle_machine_draws_is_told_apart(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    current = f"{HWMON}/hwmon1/curr1_input"
    idle = [lambda: None, lambda: None, _set(root, current, "1200")]
    reading = _measure(root, _set(root, current, "2000"), idle=idle)  # 6 W, 2 s later 10 W, still so 1 s later
    assert reading.idle == Idle(6.0, 4, pytest.approx(6.0), ())
    assert reading.rails["VDD_IN"].joules == pytest.approx(16 + 10)
    assert reading.joules_per_token == pytest.approx(2.6)
    assert reading.joules_per_token_above_idle == pytest.approx((26 - 3 * 6) / 10)
    assert reading.joules_per_image_above_idle == pytest.approx((26 - 3 * 6) / 2)


def test_without_a_total_nothing_is_above_idle(tmp_path: Path) -> None:
    reading = _measure(_write(tmp_path, {n: t for n, t in THOR.items() if "hwmon10" not in n}), idle=[lambda: None])
    assert (reading.idle.watts, reading.joules_per_token_above_idle) == (None, None)


# ---------------------------------------------------------------- heat
def test_temperatures(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    zone = f"{THERMAL}/thermal_zone0/temp"
    reading = _measure(root, _set(root, zone, "61500"), _set(root, zone, "60000"))
    assert reading.temperatures == {"cpu-thermal": Heat(48.5, 61.5), "gpu-thermal": Heat(47.0, 47.0)}
    assert reading.throttled == ()
    off = f"temperature cv0-thermal: /{THERMAL}/thermal_zone2/temp cannot be read: -256 °C"
    assert any(note.startswith(off) for note in reading.absent)


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        (f"{THERMAL}/cooling_device1/cur_state", "1", "cpu-throttle-alert"),  # the firmware's
        (f"{HWMON}/hwmon3/oc3_event_cnt", "4", "over-current oc3"),
        (f"{THERMAL}/thermal_zone1/temp", "99000", "gpu-thermal at 99 °C"),  # the passive trip point
    ],
)
def test_throttling_for_a_moment_counts(tmp_path: Path, file: str, text: str, name: str) -> None:
    root = _write(tmp_path, ORIN_NANO)
    assert _measure(root, _set(root, file, text), _set(root, file, ORIN_NANO[file])).throttled == (name,)


def test_events_that_are_counted_at_idle_too_are_told_there(tmp_path: Path) -> None:
    root = _write(tmp_path, ORIN_NANO)
    events = f"{HWMON}/hwmon3/oc3_event_cnt"
    hot = _set(root, f"{THERMAL}/cooling_device1/cur_state", "1")
    reading = _measure(root, _set(root, events, "5"), hot, idle=[_set(root, events, "4")])
    assert reading.idle.throttled == ("over-current oc3",)
    assert set(reading.throttled or ()) == {"over-current oc3", "cpu-throttle-alert"}
    cool = _measure(_write(root, ORIN_NANO), idle=[_set(root, events, "6")])
    assert (cool.idle.throttled, cool.throttled) == (("over-current oc3",), ())


def _cpus(count: int) -> dict[str, str]:
    """Processors with two threads a core and four cores a package."""
    files = {}
    for cpu in range(count):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{folder}/topology/physical_package_id"] = f"{cpu // 8}\n"
        files[f"{folder}/topology/core_cpus_list"] = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n"
        files |= {f"{folder}/thermal_throttle/{kind}_throttle_count": "7\n" for kind in ("core", "package")}
    return files


def test_throttle_counters_of_a_processor(tmp_path: Path) -> None:
    root = _write(tmp_path, DESKTOP | _cpus(16))
    assert _measure(root, architecture=X86).throttled == ()
    cpu = "sys/devices/system/cpu/cpu8/thermal_throttle"
    steps = [_set(root, f"{cpu}/{kind}_throttle_count", "8") for kind in ("core", "package")]
    assert _measure(root, *steps, architecture=X86).throttled == ("core 8-9", "package 1")


def test_a_counter_is_read_once_for_each_package_and_core(tmp_path: Path) -> None:
    sensors = find_sensors(_write(tmp_path, DESKTOP | _cpus(16)), X86, _no_nvml)
    cores = [f"core {n}-{n + 1}" for n in range(0, 16, 2)]
    assert set(sensors.throttles) == {"package 0", "package 1", *cores}


def test_counters_without_a_topology_are_read_for_each_processor(tmp_path: Path) -> None:
    files = {f"sys/devices/system/cpu/cpu{n}/thermal_throttle/core_throttle_count": "0\n" for n in range(3)}
    assert set(find_sensors(_write(tmp_path, files), X86, _no_nvml).throttles) == {"core 0", "core 1", "core 2"}


def test_zones_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    temperatures = _measure(_write(tmp_path, DESKTOP), architecture=X86).temperatures
    assert temperatures == {"acpitz 0": Heat(30.0, 30.0), "acpitz 1": Heat(31.0, 31.0)}


def test_a_zone_without_an_answer_at_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is switched off says "try again"; Python's file objects make a TypeError of that."""
    root = _write(tmp_path, ORIN_NANO)
    ends = os.pipe2(os.O_NONBLOCK)
    asleep, opened = [True], os.open

    def open_(path: Path, flags: int) -> int:
        return os.dup(ends[0]) if asleep[0] and str(path).endswith("thermal_zone1/temp") else opened(path, flags)

    monkeypatch.setattr(sensors_module.os, "open", open_)
    reading = _measure(root, lambda: asleep.clear() or asleep.append(False))
    assert reading.temperatures["gpu-thermal"] == Heat(47.0, 47.0)
    assert "gpu-thermal: 1 of 3 readings failed" in reading.absent
    for end in ends:
        os.close(end)


# ---------------------------------------------------------------- what is absent
def test_no_permission_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _write(tmp_path, DESKTOP)
    opened = os.open

    def open_(path: Path, flags: int) -> int:  # root may read everything, so that modes would not do
        if str(path).endswith("energy_uj"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags)

    monkeypatch.setattr(sensors_module.os, "open", open_)
    reading = _measure(root, architecture=X86)
    assert reading.rails == {}
    fix = f"sudo chmod a+r /{RAPL}/intel-rapl:*/energy_uj"
    assert f"RAPL package-0: no permission to read /{RAPL}/intel-rapl:0/energy_uj: {fix}" in reading.absent


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    reading = _measure(tmp_path, architecture=X86)
    assert (reading.rails, reading.temperatures, reading.throttled) == ({}, {}, None)
    assert [note.partition(":")[0] for note in reading.absent] == [
        "board power",
        "RAPL",
        "NVML",
        "temperatures",
        "throttling",
    ]


def test_a_jetson_is_no_x86_processor(tmp_path: Path) -> None:
    assert "RAPL: not an x86 processor (aarch64)" in find_sensors(tmp_path, JETSON, _no_nvml).absent


def test_as_dict(tmp_path: Path) -> None:
    data = _measure(_write(tmp_path, ORIN_NANO)).as_dict()
    assert data["rails"]["VDD_SOC"] == pytest.approx({"watts": 1.4, "joules": 1.4})
    assert data["total"] == ("VDD_IN",)
    assert data["temperatures"]["cpu-thermal"] == {"start": 48.5, "peak": 48.5}
    assert isinstance(data["absent"], tuple)
    assert data["idle"] == {"seconds": 0.0, "samples": 1, "watts": None, "throttled": ()}
    assert set(data) == {
        *("rails", "total", "scope", "seconds", "samples", "joules_per_token", "joules_per_image"),
        *("joules_per_token_above_idle", "joules_per_image_above_idle", "idle", "temperatures", "throttled", "absent"),
    }


# ---------------------------------------------------------------- NVML
NOT_SUPPORTED = 3


def _library(power: int | None, reasons: int = 0x1) -> SimpleNamespace:
    """Functions as libnvidia-ml has them, of one GPU; `power` in mW, None where it is not supported."""

    def put(value: int | None) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            if value is None:
                return NOT_SUPPORTED
            arguments[-1]._obj.value = value
            return 0

        return function

    def name(handle: object, buffer: Any, size: object) -> int:
        buffer.value = b"NVIDIA Example"
        return 0

    return SimpleNamespace(
        nvmlErrorString=lambda status: {NOT_SUPPORTED: b"Not Supported"}[status],
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetCount_v2=put(1),
        nvmlDeviceGetHandleByIndex_v2=put(1),
        nvmlDeviceGetName=name,
        nvmlDeviceGetPowerUsage=put(power),
        nvmlDeviceGetTemperature=put(61),
        nvmlDeviceGetCurrentClocksThrottleReasons=put(reasons),
    )


class FunctionLike:
    """Takes attributes, as the functions of ctypes do."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimpleNamespace], None]:
    def replace(library: SimpleNamespace) -> None:
        library.nvmlErrorString = FunctionLike(library.nvmlErrorString)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)

    return replace


def test_a_desktop_with_a_gpu(tmp_path: Path, load: Callable[[SimpleNamespace], None]) -> None:
    load(_library(power=250_000))
    reading = _measure(_write(tmp_path, DESKTOP), architecture=X86, nvml=nvidia_gpus)
    assert reading.rails["GPU 0 NVIDIA Example"] == RailEnergy(pytest.approx(250.0), pytest.approx(250.0))
    assert reading.total == ("package-0", "package-0 dram", "GPU 0 NVIDIA Example")
    assert reading.scope == "processor and GPU"
    assert reading.temperatures["GPU 0 NVIDIA Example"] == Heat(61.0, 61.0)
    assert reading.throttled == ()


def test_without_the_processors_counters_the_total_is_the_gpu_alone(
    tmp_path: Path, load: Callable[[SimpleNamespace], None]
) -> None:
    load(_library(power=250_000))
    reading = _measure(tmp_path, architecture=X86, nvml=lambda: (*nvidia_gpus(), *_renamed(nvidia_gpus())))
    assert reading.total == ("GPU 0 NVIDIA Example", "GPU 1")
    assert reading.scope == "GPU alone"


def _renamed(gpus: tuple[NvidiaGpu, ...]) -> list[NvidiaGpu]:
    return [replace(gpu, name="GPU 1") for gpu in gpus]


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0x01, False), (0x02, False), (0x10, False), (0x100, False), *((1 << bit, True) for bit in (2, 3, 5, 6, 7))],
)
def test_reasons_of_a_gpu(
    tmp_path: Path, load: Callable[[SimpleNamespace], None], reasons: int, throttled: bool
) -> None:
    load(_library(power=1, reasons=reasons))
    names = ("GPU 0 NVIDIA Example",) if throttled else ()
    assert _measure(tmp_path, architecture=X86, nvml=nvidia_gpus).throttled == names


def test_a_gpu_that_does_not_tell_its_power(tmp_path: Path, load: Callable[[SimpleNamespace], None]) -> None:
    load(_library(power=None))
    reading = _measure(_write(tmp_path, THOR), nvml=nvidia_gpus)
    assert "GPU 0 NVIDIA Example power: NVML says: Not Supported" in reading.absent
    assert reading.total == ("VIN",)


def test_the_gpu_of_a_board_is_not_counted_twice(tmp_path: Path, load: Callable[[SimpleNamespace], None]) -> None:
    load(_library(power=9000))
    reading = _measure(_write(tmp_path, THOR), nvml=nvidia_gpus)
    assert reading.rails["GPU 0 NVIDIA Example"].watts == pytest.approx(9.0)
    assert reading.total == ("VIN",)


def test_no_driver() -> None:
    with pytest.raises(OSError, match="libnvidia-ml-of-nobody"):
        nvidia_gpus("libnvidia-ml-of-nobody.so.1")
