"""What a machine is, from made-up system files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mllm_edge.runtime.machine.hardware import Gpu, PowerMode, read_machine
from tests.runtime.machines import MACHINES

DESKTOP = """processor\t: 0
model name\t: Example CPU 9000
flags\t\t: fpu avx2 avx512_vnni sse

processor\t: 1
model name\t: Example CPU 9000
flags\t\t: fpu avx2 avx512_vnni sse
"""
ORIN = """processor\t: 0
model name\t: ARMv8 Processor rev 1 (v8l)
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def _program(folder: Path, script: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_desktop(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {
        "proc/cpuinfo": DESKTOP,
        "proc/meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   600 kB\n",
        topology.format(0): "0-1\n",
        topology.format(1): "0-1\n",
    }
    machine = read_machine(_write(tmp_path, files), architecture="x86_64")
    assert (machine.architecture, machine.cpu, machine.cores, machine.threads) == ("x86_64", "Example CPU 9000", 1, 2)
    assert machine.features == ("avx2", "avx512_vnni")
    assert (machine.memory, machine.memory_free) == (1000 * 1024, 600 * 1024)
    assert machine.disk_free > 0
    assert (machine.board, machine.l4t, machine.jetpack, machine.driver, machine.gpus) == ("", "", "", "", ())


def test_a_jetson_has_a_gpu_that_no_program_lists(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": ORIN,
        "etc/nv_tegra_release": RELEASE,
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    }
    machine = read_machine(_write(tmp_path, files))
    assert (machine.l4t, machine.jetpack) == ("36.4.3", "6")
    assert machine.board == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (machine.cpu, machine.features) == ("Cortex-A78AE", ("asimd", "asimddp"))
    assert [gpu.compute_capability for gpu in machine.gpus] == ["8.7"]


@pytest.mark.parametrize(("release", "jetpack"), [("R35", "5"), ("R36", "6"), ("R38", "7"), ("R99", "")])
def test_jetpack(tmp_path: Path, release: str, jetpack: str) -> None:
    files = {"etc/nv_tegra_release": RELEASE.replace("R36", release)}
    assert read_machine(_write(tmp_path, files)).jetpack == jetpack


def test_gpus_by_the_program(tmp_path: Path) -> None:
    rows = "NVIDIA Example 1, 580.1, 24576, 8.9\nNVIDIA GB10, 580.1, [N/A], 12.1"
    machine = read_machine(tmp_path, _program(tmp_path, f"cat <<END\n{rows}\nEND"))
    assert machine.driver == "580.1"
    assert machine.gpus == (Gpu("NVIDIA Example 1", 24 << 30, "8.9"), Gpu("NVIDIA GB10", 0, "12.1"))


@pytest.mark.parametrize("script", ["echo 'no devices were found'; exit 6", "echo nonsense", "exit 0", None])
def test_gpus_by_files_where_the_program_is_of_no_help(tmp_path: Path, script: str | None) -> None:
    module = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n"
    files = {
        "proc/driver/nvidia/version": module,
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA Example 2\nIRQ: 1\n",
    }
    _write(tmp_path, files)
    program = str(tmp_path / "missing") if script is None else _program(tmp_path, script)
    machine = read_machine(tmp_path, program)
    assert (machine.driver, machine.gpus) == ("580.65.06", (Gpu("NVIDIA Example 2"),))


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert machine.architecture
    assert (machine.cpu, machine.cores, machine.threads, machine.memory, machine.features) == ("", 0, 0, 0, ())


ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "orin nano",
            {
                "jetpack": "6",
                "unified": True,
                "cuda": "12.6.68",
                "power": PowerMode("25W", "MAXN_SUPER", 2),
                "tensorrt": "10.3.0",
                "tensorrt_python": ("3.10",),
                "gpus": (Gpu(f"integrated, {ORIN_NANO}", compute_capability="8.7"),),
            },
        ),
        (
            "agx orin",
            {
                "jetpack": "6",
                "unified": True,
                "power": PowerMode("MAXN", "MAXN", 0),
                "tensorrt": "10.3.0",
                "tensorrt_python": (),
                "gpus": (Gpu("Orin (nvgpu)", compute_capability="8.7"),),
                "driver": "540.4.0",
            },
        ),
        (
            "thor",
            {
                "jetpack": "7",
                "unified": True,
                "cuda": "13.0.0",
                "cpu": "Neoverse-V3AE",
                "power": PowerMode("120W", "MAXN", 0),
                "tensorrt": "10.13.3",
                "tensorrt_python": ("3.12",),
                "gpus": (Gpu("NVIDIA Thor", compute_capability="11.0"),),
            },
        ),
        (
            "desktop",
            {
                "jetpack": "",
                "unified": False,
                "cuda": "",
                "power": None,
                "tensorrt": "",
                "tensorrt_python": (),
                "gpus": (Gpu("NVIDIA Example 3", 12 << 30, "8.6"),),
                "memory_free": 20_000_000 * 1024,
            },
        ),
    ],
)
def test_whole_machines(tmp_path: Path, name: str, expected: dict[str, object]) -> None:
    tree = MACHINES[name]
    program = _program(tmp_path, f"echo '{tree.smi}'") if tree.smi else None
    machine = read_machine(tree.write(tmp_path / "root"), program, tree.architecture)
    assert {key: getattr(machine, key) for key in expected} == expected


@pytest.mark.parametrize("file", ["etc/nvpmodel.conf", "var/lib/nvpmodel/status"])
def test_a_power_mode_that_is_not_told(tmp_path: Path, file: str) -> None:
    root = MACHINES["thor"].write(tmp_path)
    (root / file).write_text("pmode:0009")
    assert read_machine(root).power is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells no other peak than getrusage's")
def test_the_peak_is_not_the_parents() -> None:
    block = np.ones(400_000_000, np.uint8)
    code = "from mllm_edge.runtime.machine.cpu import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < block.nbytes
