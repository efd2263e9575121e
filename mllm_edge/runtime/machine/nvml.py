"""NVIDIA GPUs by NVML, the library that comes with the driver: power, temperature, throttling, memory."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["NvidiaGpu", "nvidia_gpus"]

_TEMPERATURE_GPU = 0
# Clocks held back by a software power cap, by hardware (slowdown, power brake), or by heat (software, hardware).
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class NvidiaGpu:
    """`power` in watts, `temperature` in °C, `throttled` now, `memory_used` in bytes, by all processes; each raises
    OSError where the GPU does not tell."""

    name: str
    power: Callable[[], float]
    temperature: Callable[[], float]
    throttled: Callable[[], bool]
    memory_used: Callable[[], int]


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def nvidia_gpus(library: str = "libnvidia-ml.so.1") -> tuple[NvidiaGpu, ...]:
    """The GPUs that the driver lists. Raises OSError where there is no driver, or it does not answer."""
    nvml = ctypes.CDLL(library)
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    _check(nvml, nvml.nvmlInit_v2())  # stays open until the process ends, as CUDA's own use of it does
    count = _get(nvml, ctypes.c_uint, nvml.nvmlDeviceGetCount_v2)
    return tuple(_gpu(nvml, index) for index in range(int(count)))


def _gpu(nvml: Any, index: int) -> NvidiaGpu:
    handle = ctypes.c_void_p()
    _check(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)))
    name = ctypes.create_string_buffer(96)
    _check(nvml, nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name))))

    def power() -> float:
        return _get(nvml, ctypes.c_uint, nvml.nvmlDeviceGetPowerUsage, handle) / 1000

    def temperature() -> float:
        return float(_get(nvml, ctypes.c_uint, nvml.nvmlDeviceGetTemperature, handle, _TEMPERATURE_GPU))

    def throttled() -> bool:
        reasons = _get(nvml, ctypes.c_ulonglong, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return bool(reasons & _THROTTLED)

    def memory_used() -> int:
        memory = _Memory()
        _check(nvml, nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
        return int(memory.used)

    return NvidiaGpu(f"GPU {index} {name.value.decode()}", power, temperature, throttled, memory_used)


def _get(nvml: Any, kind: Any, function: Any, *arguments: Any) -> int:
    """What a function writes behind its last argument."""
    value = kind()
    _check(nvml, function(*arguments, ctypes.byref(value)))
    return value.value


def _check(nvml: Any, status: int) -> None:
    if status:
        raise OSError(nvml.nvmlErrorString(status).decode())
