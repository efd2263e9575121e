"""File trees of four machines, put together in the form that their systems write (not recorded on boards), and
nvidia-smi's answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MACHINES", "Tree"]

_RELEASE = "# {} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
_CORE = "processor\t: {}\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd asimddp\nCPU part\t: {}\n\n"
_MEMORY = "MemTotal:       {} kB\nMemFree:         100 kB\nMemAvailable:    {} kB\n"
_NVPMODEL = """# comment
< POWER_MODEL ID=0 NAME={} >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME={} >
< POWER_MODEL ID=2 NAME={} >
< PM_CONFIG DEFAULT=1 >
"""
_PYTHON = "usr/lib/{}/dist-packages/tensorrt/__init__.py"
_LIBRARY = "usr/lib/aarch64-linux-gnu/libnvinfer.so.{}"


@dataclass(frozen=True)
class Tree:
    """`files` below the root; `smi`: the row that nvidia-smi prints, "" where there is no such program."""

    files: Mapping[str, str]
    smi: str = ""
    architecture: str = "aarch64"

    def write(self, root: Path) -> Path:
        for name, text in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return root


MACHINES: Mapping[str, Tree] = {
    "orin nano": Tree(
        {
            "proc/cpuinfo": "".join(_CORE.format(i, "0xd42") for i in range(6)),
            "proc/meminfo": _MEMORY.format(7_800_000, 5_000_000),
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "etc/nv_tegra_release": _RELEASE.format("R36", "4.3"),
            "etc/nvpmodel.conf": _NVPMODEL.format("15W", "25W", "MAXN_SUPER"),
            "var/lib/nvpmodel/status": "pmode:0001",
            "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}',
            _PYTHON.format("python3.10"): "",
            _LIBRARY.format("10.3.0"): "",
            _LIBRARY.format("10"): "",
        },
    ),
    "agx orin": Tree(
        {
            "proc/cpuinfo": "".join(_CORE.format(i, "0xd42") for i in range(12)),
            "proc/meminfo": _MEMORY.format(64_000_000, 60_000_000),
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "etc/nv_tegra_release": _RELEASE.format("R36", "4.0"),
            "etc/nvpmodel.conf": _NVPMODEL.format("MAXN", "15W", "30W"),
            "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet",
            "usr/local/cuda/version.json": '{"cuda": {"version": "12.6.68"}}',
            _LIBRARY.format("10.3.0"): "",
        },
        smi="Orin (nvgpu), 540.4.0, [N/A], [N/A]",
    ),
    "thor": Tree(
        {
            "proc/cpuinfo": "".join(_CORE.format(i, "0xd83") for i in range(14)),
            "proc/meminfo": _MEMORY.format(128_000_000, 120_000_000),
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "etc/nv_tegra_release": _RELEASE.format("R38", "2.0"),
            "etc/nvpmodel.conf": _NVPMODEL.format("MAXN", "120W", "70W"),
            "var/lib/nvpmodel/status": "pmode:0001",
            "usr/local/cuda/version.json": '{"cuda": {"version": "13.0.0"}}',
            _PYTHON.format("python3.12"): "",
            _LIBRARY.format("10.13.3"): "",
        },
        smi="NVIDIA Thor, 580.00, [N/A], 11.0",
    ),
    "desktop": Tree(
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Example CPU 9000\nflags\t\t: fpu avx2\n\n",
            "proc/meminfo": _MEMORY.format(32_000_000, 20_000_000),
            "usr/local/cuda/version.json": "not JSON",
        },
        smi="NVIDIA Example 3, 580.65.06, 12288, 8.6",
        architecture="x86_64",
    ),
}
