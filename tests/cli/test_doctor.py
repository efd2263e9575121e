"""`mllm-edge doctor` on a made-up machine."""

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from mllm_edge.runtime.backends import cuda, installed
from mllm_edge.runtime.backends.installed import Engine
from mllm_edge.runtime.machine import hardware
from mllm_edge.runtime.machine.hardware import Gpu, Machine

Cli = Callable[..., Result]
BOARD = Machine(
    "aarch64", "Cortex-A78AE", 12, 12, ("asimd",), 64 << 30, 32 << 30, 10**9, "Example Board", "36.4.3", "6", "", ()
)
CPU = {"onnxruntime": Engine("onnxruntime", "1.23.0", ("CPUExecutionProvider",))}
TWO = {"onnxruntime": ("onnxruntime 1", "onnxruntime-gpu 1")}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`here(engines, gpus=…)`: what the command finds."""

    def put(
        engines: dict[str, Engine], wheels: dict | None = None, gpus: tuple[Gpu, ...] = (), refused: str = ""
    ) -> None:
        found = Machine(**{**vars(BOARD), "gpus": gpus})
        monkeypatch.setattr(hardware, "read_machine", lambda *a: found)
        monkeypatch.setattr(cuda, "gpu_problem", lambda: refused)
        monkeypatch.setattr(installed, "engines", lambda: engines)
        monkeypatch.setattr(installed, "wheels", lambda: wheels or {})
        monkeypatch.setattr(installed, "extras", lambda: {"cpu": (), "export": ("torch", "onnx")})

    return put


def test_text(cli: Cli, here: Callable[..., None]) -> None:
    here(CPU, TWO)
    result = cli("doctor")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"{'cpu':<16}works" in lines
    assert f"{'tensorrt':<16}does not work here" in lines
    assert f"{'cuda':<16}does not work here" in lines
    assert lines[-1] == f"{'use':<16}mllm-edge export --target cpu"
    assert f"{'extras':<16}cpu, export (lacks torch, onnx)" in lines
    assert f"{'board':<16}Example Board, L4T 36.4.3, JetPack 6" in lines
    assert f"{'onnxruntime':<16}1.23.0 (CPUExecutionProvider)" in lines
    assert "  no NVIDIA GPU is visible" in lines
    assert any(line.startswith("problem: ") and "overwrite each other" in line for line in lines)


def test_a_gpu_tensorrt_and_cuda_bindings_make_a_target_work(cli: Cli, here: Callable[..., None]) -> None:
    found, gpus = {"tensorrt": Engine("tensorrt", "10.3.0")}, (Gpu("Example GPU", 8 << 30, "8.7"),)
    here(found, gpus=gpus)
    result = cli("doctor")
    assert result.exit_code == 1
    assert "  cuda-bindings are not installed" in result.stdout.splitlines()
    here(found | {"cuda": Engine("cuda.bindings", "12.6")}, gpus=gpus)
    result = cli("doctor")
    assert result.exit_code == 0
    assert f"{'tensorrt-10.3':<16}works" in result.stdout.splitlines()
    assert "Example GPU, 8.59 GB, compute capability 8.7" in result.stdout


def test_the_driver_is_named(cli: Cli, here: Callable[..., None]) -> None:
    found = {"tensorrt": Engine("tensorrt", "10.3.0"), "cuda": Engine("cuda.bindings", "12.9.10")}
    here(found, gpus=(Gpu("Example GPU", 8 << 30, "8.7"),), refused="cudaErrorInsufficientDriver")
    result = cli("doctor")
    assert result.exit_code == 1
    assert "  the driver is too old for cuda-bindings 12.9.10 (cudaErrorInsufficientDriver)" in result.stdout
    assert "<12.9" in result.stdout


@pytest.mark.parametrize(("engines", "code"), [(CPU, 0), ({}, 1), ({"onnxruntime": Engine("x", problem="no")}, 1)])
def test_json_and_exit_code(cli: Cli, here: Callable[..., None], engines: dict[str, Engine], code: int) -> None:
    here(engines)
    result = cli("doctor", "--json")
    assert result.exit_code == code
    data = json.loads(result.stdout)
    assert {name: target["works"] for name, target in data["targets"].items()} == {
        "cpu": code == 0,
        "cuda": False,
        "tensorrt": False,
        "tensorrt-10.3": False,
    }
    assert data["targets"]["tensorrt"]["exported"]
    assert data["targets"]["tensorrt"]["runs"]
    assert data["targets"]["cuda"]["runs"]
    assert data["use"] == ("cpu" if code == 0 else "")
    assert data["machine"]["board"] == "Example Board"
    assert bool(data["targets"]["cpu"]["problems"]) == bool(code)


def test_on_this_machine_whatever_it_is(cli: Cli) -> None:
    """The tests need ONNX Runtime, so the target cpu works wherever they run."""
    result = cli("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["targets"]["cpu"]["works"]
    assert data["engines"]["onnxruntime"]["version"]
