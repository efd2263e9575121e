"""What the machine offers: CPU cores and memory."""

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["cpu_name", "give_back_memory", "peak_rss", "physical_cores", "resident"]

_STATUS = Path("/proc/self/status")


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once, limited by a container's processor quota; at least 1."""
    everything = range(os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everything
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return max(1, min(len(siblings), _quota() or len(siblings)))


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return os.uname().machine if hasattr(os, "uname") else sys.platform


def resident() -> int:
    """Resident memory of this process in bytes; 0 where it cannot be read."""
    return _told("VmRSS") or 0


def peak_rss() -> int:
    """Peak resident memory of this process in bytes; 0 where it cannot be read."""
    told = _told("VmHWM")  # what getrusage tells may be the parent's peak, if that was larger
    if told is not None:
        return told
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _told(name: str) -> int | None:
    """Bytes of a line of the process's status; None where there is no such line."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    told = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if told is None else 1024 * int(told.split()[1])


def give_back_memory() -> None:
    """Return to the system what was freed: glibc keeps it, and arrays of a few MB by the hundred leave as much as they
    took. Does nothing where there is no such call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc; Windows takes no None
        return


def _quota() -> int:
    """Whole CPUs granted by the control group (version 2), 0 when there is no limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return 0
    limit, _, period = path.read_text().partition(" ")
    return 0 if limit.strip() == "max" else max(1, int(limit) // int(period))
