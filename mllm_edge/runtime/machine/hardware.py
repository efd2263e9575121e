"""What hardware this is, from files below a root: CPU, memory, board, NVIDIA GPUs."""

import csv
import json
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Gpu", "Machine", "PowerMode", "read_machine"]

# What the CPU kernels make use of.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
_CORES = {
    0xD03: "Cortex-A53",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD42: "Cortex-A78AE",
    0xD83: "Neoverse-V3AE",
}
# Jetson → compute capability.
_BOARDS = {"Orin": "8.7", "Thor": "11.0"}


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; memory in bytes, 0 where it is not told."""

    name: str
    memory: int = 0
    compute_capability: str = ""


@dataclass(frozen=True)
class PowerMode:
    """A Jetson's power mode in use, and the one without a limit; its `number` is nvpmodel's."""

    name: str
    fastest: str
    number: int


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, 0 and "" for what the system does not tell. `jetpack`: the major version, on a Jetson. `unified`:
    the GPU uses the CPU's memory. `tensorrt`: the version of the system's own TensorRT, and `tensorrt_python` the
    versions of Python that see it."""

    architecture: str
    cpu: str
    cores: int
    threads: int
    features: tuple[str, ...]
    memory: int
    memory_free: int
    disk_free: int
    board: str
    l4t: str
    jetpack: str
    driver: str
    gpus: tuple[Gpu, ...]
    unified: bool = False
    cuda: str = ""
    power: PowerMode | None = None
    tensorrt: str = ""
    tensorrt_python: tuple[str, ...] = ()


def read_machine(root: Path = Path("/"), nvidia_smi: str | None = None, architecture: str = "") -> Machine:
    """The machine whose system files lie below `root`. `nvidia_smi`: a program to ask about GPUs, if there is one."""
    info = _text(root / "proc/cpuinfo")
    fields = [(key.strip().lower(), value.strip()) for key, _, value in (n.partition(":") for n in info.splitlines())]
    flags = {word for key, value in fields if key in ("flags", "features") for word in value.split()}
    threads = sum(key == "processor" for key, _ in fields)
    siblings = {_text(p) for p in root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")}
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M))
    l4t = _l4t(_text(root / "etc/nv_tegra_release"))
    driver, gpus = _nvidia(root, nvidia_smi)
    board = _text(root / "proc/device-tree/model").strip("\0 \n")
    if l4t:
        # nvidia-smi is missing on older boards, and tells little on others.
        gpus = gpus or (Gpu(f"integrated, {board}"),)
        gpus = tuple(replace(gpu, compute_capability=gpu.compute_capability or _capability(board)) for gpu in gpus)
    return Machine(
        architecture=architecture or platform.machine(),
        cpu=_cpu_name(fields),
        cores=len(siblings) or threads,
        threads=threads,
        features=tuple(name for name in _FEATURES if name in flags),
        memory=1024 * int(memory.get("MemTotal", 0)),
        memory_free=1024 * int(memory.get("MemAvailable", 0)),
        disk_free=shutil.disk_usage(root).free,
        board=board,
        l4t=l4t,
        jetpack={"35": "5", "36": "6", "38": "7", "39": "7"}.get(l4t.partition(".")[0], ""),
        driver=driver,
        gpus=gpus,
        unified=bool(l4t) or any("GB10" in gpu.name for gpu in gpus),
        cuda=_cuda(_text(root / "usr/local/cuda/version.json")),
        power=_power(root) if l4t else None,
        tensorrt=_tensorrt(root),
        tensorrt_python=_tensorrt_python(root),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_name(fields: list[tuple[str, str]]) -> str:
    """The core where it is known, for Arm's "model name" says little."""
    known = dict(reversed(fields))  # the first processor's
    try:
        core = _CORES.get(int(known.get("cpu part", ""), 16), "")
    except ValueError:
        core = ""
    return core or known.get("model name", "")


def _l4t(text: str) -> str:
    """ "# R36 (release), REVISION: 4.3, …" as 36.4.3."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else ""


def _capability(board: str) -> str:
    return next((capability for name, capability in _BOARDS.items() if name in board), "")


def _cuda(text: str) -> str:
    """The toolkit's version, from its version.json."""
    try:
        return str(json.loads(text)["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return ""


def _power(root: Path) -> PowerMode | None:
    """nvpmodel keeps the mode's number in one file and all modes' names in another."""
    number = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    rows = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf"))
    names = {int(i): name for i, name in rows}
    fastest = next((i for i, name in names.items() if "MAXN" in name), None)
    if number is None or int(number[1]) not in names or fastest is None:
        return None
    return PowerMode(names[int(number[1])], names[fastest], fastest)


def _tensorrt(root: Path) -> str:
    """The version in the name of the library: libnvinfer.so.10.3.0."""
    names = [path.name for path in root.glob("usr/lib/*-linux-gnu/libnvinfer.so.*.*")]
    return max((name.split(".so.")[1] for name in names), default="", key=_numbers)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".") if number.isdigit()]


def _tensorrt_python(root: Path) -> tuple[str, ...]:
    folders = root.glob("usr/lib/python3*/dist-packages/tensorrt/__init__.py")
    return tuple(sorted(path.parts[-4].removeprefix("python") for path in folders))


def _nvidia(root: Path, program: str | None) -> tuple[str, tuple[Gpu, ...]]:
    """Driver version and GPUs; the program knows more than the files do."""
    asked = _ask(program) if program else []
    if asked:
        gpus = [
            Gpu(name, int(float(mib) * 2**20) if _is_number(mib) else 0, cc if _is_number(cc) else "")
            for name, _, mib, cc in asked
        ]
        return asked[0][1], tuple(gpus)
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _text(root / "proc/driver/nvidia/version"))
    texts = [_text(path) for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information"))]
    names = [re.search(r"^Model:\s*(.+)$", text, re.M) for text in texts]
    return match[1] if match else "", tuple(Gpu(name[1].strip()) for name in names if name)


def _ask(program: str) -> list[list[str]]:
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    return [row for row in rows if len(row) == 4] if done.returncode == 0 else []


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
