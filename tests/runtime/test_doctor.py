"""Verdicts on machines and installations that are made up here."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from mllm_edge.errors import BackendError
from mllm_edge.export.targets import TARGETS, forms
from mllm_edge.runtime.backends.base import BACKENDS
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.installed import MINIMUM, Engine, engines, extras, wheels
from mllm_edge.runtime.doctor import (
    EXPORTED,
    RUNNABLE,
    Target,
    best_target,
    diagnose,
    machine_problems,
    precisions,
    wheel_problems,
)
from mllm_edge.runtime.machine.hardware import Gpu, Machine, read_machine
from tests.runtime.machines import MACHINES
from tests.runtime.tensorrt_stand_in import install

GPU = Gpu("NVIDIA Example", 8 << 30, "8.9")
ALL = ("cpu", "cuda", "tensorrt", "tensorrt-10.3")
TENSORRT = ("tensorrt", "tensorrt-10.3")


BINDINGS = {"cuda": Engine("cuda.bindings", "13.0")}


def _machine(l4t: str = "", jetpack: str = "", gpus: tuple[Gpu, ...] = (GPU,)) -> Machine:
    return Machine("x", "", 0, 0, (), 0, 0, 0, "", l4t, jetpack, "", gpus)


def _engine(name: str, version: str = "", *providers: str, problem: str = "") -> dict[str, Engine]:
    return {name: Engine(name, version, tuple(f"{p}ExecutionProvider" for p in providers), problem)}


def _verdicts(machine: Machine, found: Mapping[str, Engine], runnable: tuple[str, ...] = ALL) -> dict[str, Target]:
    return {target.name: target for target in diagnose(machine, BINDINGS | dict(found), runnable)}


def _works(machine: Machine, found: Mapping[str, Engine]) -> set[str]:
    return {name for name, target in _verdicts(machine, found).items() if target.works}


def test_runnable_targets_are_those_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr("mllm_edge.runtime.backends.onnxruntime_cuda.OnnxRuntimeCuda.__init__", lambda self: None)
    assert {open_backend(name).target for name in BACKENDS} == set(RUNNABLE) == set(ALL)
    with pytest.raises(BackendError, match="unknown backend"):
        open_backend("gpu")


def test_tensorrt_needs_the_bindings() -> None:
    found = _engine("tensorrt", "11.0")
    for machine, extra in ((_machine(), "rtx"), (_machine("38.2", "7"), "jetson")):
        for verdict in diagnose(machine, found)[2:]:
            (problem,) = verdict.problems
            assert problem.what == "cuda-bindings are not installed"
            assert f"[{extra}]" in problem.fix
    broken = {"cuda": Engine("cuda.bindings", problem="no libcuda")}
    assert "no libcuda" in diagnose(_machine(), found | broken)[2].problems[0].what


@pytest.mark.parametrize(
    ("jetpack", "fix"), [("6", "cuda-bindings>=12.6,<12.9"), ("7", "580 or newer"), ("", "580 or newer")]
)
def test_a_driver_that_is_too_old_is_named(jetpack: str, fix: str) -> None:
    found = _engine("tensorrt", "11.0") | BINDINGS
    machine = _machine("36.4" if jetpack else "", jetpack)
    for verdict in diagnose(machine, found, refused="cudaErrorInsufficientDriver")[2:]:
        (problem,) = verdict.problems
        assert problem.what == "the driver is too old for cuda-bindings 13.0 (cudaErrorInsufficientDriver)"
        assert fix in problem.fix
    (problem,) = diagnose(machine, found, refused="cudaErrorNoDevice")[2].problems
    assert problem.what == "CUDA finds no GPU: cudaErrorNoDevice"
    # Without any the missing GPU is said already.
    without = diagnose(_machine(gpus=()), found, refused="cudaErrorNoDevice")[2]
    assert [p.what for p in without.problems] == ["no NVIDIA GPU is visible"]


def test_versions_are_those_of_the_dialects() -> None:
    """Another target's graphs load in ONNX Runtime's CPU provider too, but that is not the engine they are made for."""
    assert set(EXPORTED) == set(TARGETS)
    for form in forms(tuple(TARGETS), "int4"):
        engines = {k: v for k, v in form.minimum().items() if form.dialect == "contrib" or k != "onnxruntime"}
        assert engines == MINIMUM[form.target]


@pytest.mark.parametrize(
    ("found", "working"),
    [
        ({}, set()),
        (_engine("onnxruntime", "1.23.0", "CPU"), {"cpu"}),
        (_engine("onnxruntime", "1.100", "CPU", "CUDA"), {"cpu", "cuda"}),
        (_engine("onnxruntime", "1.22.1", "CPU", "CUDA"), set()),
        (_engine("onnxruntime", "1.24.0.dev3", "CPU"), {"cpu"}),
        (_engine("onnxruntime", problem="libfoo.so: no such file"), set()),
        (_engine("tensorrt", "10.3.0.30"), {"tensorrt-10.3"}),
        (_engine("tensorrt", "10.2.0"), set()),
        (_engine("tensorrt", "10.15.1"), set(TENSORRT)),
        (_engine("tensorrt", "11.0"), set(TENSORRT)),
        (_engine("tensorrt_rtx", "1.0.0.21"), {"tensorrt-10.3"}),
        (_engine("tensorrt_rtx", "1.2.0"), set(TENSORRT)),
        (_engine("tensorrt_rtx", "0.9"), set()),
        (_engine("tensorrt_rtx", ""), set()),
        (_engine("tensorrt", "10.3.0") | _engine("tensorrt_rtx", "1.7"), set(TENSORRT)),
        (_engine("tensorrt", problem="no libnvinfer") | _engine("tensorrt_rtx", "1.7"), set(TENSORRT)),
    ],
)
def test_engines_by_version(found: dict[str, Engine], working: set[str]) -> None:
    """TensorRT's 10.3 and TensorRT for RTX's 1.0 are numbers of two different engines."""
    assert _works(_machine(), found) == working


def test_without_a_gpu_only_the_cpu_works() -> None:
    everything = _engine("onnxruntime", "1.30", "CPU", "CUDA") | _engine("tensorrt", "11.0")
    verdicts = _verdicts(_machine(gpus=()), everything)
    assert [name for name, target in verdicts.items() if target.works] == ["cpu"]
    for name in ("cuda", *TENSORRT):
        assert [problem.what for problem in verdicts[name].problems] == ["no NVIDIA GPU is visible"]


def test_only_what_this_version_runs_works() -> None:
    everything = _engine("onnxruntime", "1.30", "CPU", "CUDA") | _engine("tensorrt", "11.0") | BINDINGS
    targets = diagnose(_machine(), everything)
    assert not any(target.problems for target in targets)
    assert {target.name for target in targets if target.works} == set(RUNNABLE)
    assert {target.name for target in targets if target.exported} == set(ALL)


def test_every_problem_has_a_fix() -> None:
    broken = _engine("onnxruntime", problem="x") | _engine("tensorrt", problem="y") | _engine("tensorrt_rtx", "0.1")
    for found in ({}, broken, _engine("onnxruntime", "1.1")):
        for target in diagnose(_machine(gpus=()), found):
            assert all(problem.what and problem.fix for problem in target.problems)
            assert target.problems or target.works


def test_on_a_jetson() -> None:
    """CUDA wheels come from elsewhere, TensorRT for RTX does not count, and JetPack 6 stays on 10.3."""
    jetson = _machine("36.4.3", "6")
    found = _engine("onnxruntime", "1.23", "CPU") | _engine("tensorrt", "10.3.0") | _engine("tensorrt_rtx", "1.7")
    assert _works(jetson, found) == {"cpu", "tensorrt-10.3"}
    verdicts = _verdicts(jetson, found)
    (cuda,), (tensorrt,) = verdicts["cuda"].problems, verdicts["tensorrt"].problems
    assert "not PyPI" in cuda.fix
    assert "jp6" in cuda.fix
    assert "--target tensorrt-10.3" in tensorrt.fix
    assert "nvidia-jetpack" in _verdicts(jetson, {})["tensorrt"].problems[0].fix
    (desktop,) = _verdicts(_machine(), found)["cuda"].problems
    assert "jetson" not in desktop.fix
    assert "pip install onnxruntime-gpu" in desktop.fix
    (newer,) = _verdicts(_machine("38.2", "7"), _engine("tensorrt", "10.13"))["tensorrt"].problems
    assert newer.fix == "upgrade TensorRT"


def _install(folder: Path, name: str, version: str, *files: str, requires: tuple[str, ...] = ()) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")


def test_wheels_that_overwrite_each_other(tmp_path: Path) -> None:
    _install(tmp_path, "onnxruntime", "1.30", "onnxruntime/__init__.py", "onnxruntime/capi/__init__.py")
    _install(tmp_path, "onnxruntime-gpu", "1.29", "onnxruntime/__init__.py")
    _install(tmp_path, "onnxruntime-genai", "0.9", "onnxruntime_genai/__init__.py")
    _install(tmp_path, "tensorrt_rtx_cu13_bindings", "1.7", "tensorrt_rtx_bindings/__init__.py")
    _install(tmp_path, "unrelated", "1", "unrelated/__init__.py")
    found = wheels([str(tmp_path)])
    assert found == {
        "onnxruntime": ("onnxruntime 1.30", "onnxruntime-gpu 1.29"),
        "onnxruntime_genai": ("onnxruntime-genai 0.9",),
        "tensorrt_rtx_bindings": ("tensorrt_rtx_cu13_bindings 1.7",),
    }
    (problem,) = wheel_problems(found)
    assert "overwrite each other" in problem.what
    assert problem.fix.startswith("pip uninstall onnxruntime onnxruntime-gpu,")


def test_extras(tmp_path: Path) -> None:
    requires = ("click>=8.1", 'Onnx_IR>=1; extra == "export"', 'torch[x]>=2; extra == "export"', "a.b; extra == 'cpu'")
    requires += ('c<2; python_version < "3.11" and extra == "gpu"', 'c>=2; python_version >= "3.11" and extra == "gpu"')
    _install(tmp_path, "mllm-edge", "1", requires=requires)
    _install(tmp_path, "onnx-ir", "1.0")
    _install(tmp_path, "a-b", "1.0")
    assert extras([str(tmp_path)]) == {"export": ("torch",), "cpu": (), "gpu": ("c",)}
    (tmp_path / "empty").mkdir()
    assert extras([str(tmp_path / "empty")]) == {}


@pytest.fixture
def _no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import finds no engine unless a test puts one there."""

    class Nothing:
        def find_spec(self, name: str, path=None, target=None) -> None:
            if name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda", "cuda.bindings"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda", "cuda.bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])


@pytest.mark.usefixtures("_no_engines")
def test_engines_are_imported_to_be_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert engines() == {}
    runtime, rtx = ModuleType("onnxruntime"), ModuleType("tensorrt_rtx_bindings")
    runtime.__version__, runtime.get_available_providers = "1.30", lambda: ["AExecutionProvider"]  # type: ignore
    rtx.__version__ = "1.7.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", rtx)
    assert engines() == {
        "onnxruntime": Engine("onnxruntime", "1.30", ("AExecutionProvider",)),
        "tensorrt_rtx": Engine("tensorrt_rtx_bindings", "1.7.1"),
    }


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise OSError('libnvinfer.so.10: cannot open\\nmore')", "libnvinfer.so.10: cannot open"),
        ("import missing_here", "No module named 'missing_here'"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_an_engine_that_does_not_load(monkeypatch, tmp_path: Path, code: str, words: str) -> None:
    from mllm_edge.runtime.backends import installed

    (tmp_path / "broken_engine.py").write_text(code + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installed, "_MODULES", {"tensorrt": ("broken_engine",)})
    assert engines() == {"tensorrt": Engine("broken_engine", problem=words)}


@pytest.mark.parametrize(
    ("name", "found", "best"),
    [
        ("orin nano", _engine("tensorrt", "10.3.0"), "tensorrt-10.3"),
        ("agx orin", _engine("onnxruntime", "1.23", "CPU", "CUDA"), "cuda"),
        ("thor", _engine("tensorrt", "10.13.3"), "tensorrt-10.3"),
        ("thor", _engine("tensorrt", "10.15"), "tensorrt"),
        ("desktop", _engine("onnxruntime", "1.23", "CPU") | _engine("tensorrt_rtx", "1.7"), "tensorrt"),
        ("desktop", _engine("onnxruntime", "1.23", "CPU"), "cpu"),
        ("desktop", {}, ""),
    ],
)
def test_the_target_to_use(tmp_path: Path, name: str, found: dict[str, Engine], best: str) -> None:
    machine = _read(tmp_path, name)
    assert best_target(diagnose(machine, BINDINGS | found)) == best


def _read(folder: Path, name: str) -> Machine:
    tree = MACHINES[name]
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{tree.smi}'\n", encoding="utf-8")
    program.chmod(0o755)
    return read_machine(tree.write(folder / "root"), str(program) if tree.smi else None, tree.architecture)


def test_tensorrt_that_this_environment_does_not_see(tmp_path: Path) -> None:
    for name, words, fix in (
        ("orin nano", "TensorRT 10.3.0 is installed for the system's Python 3.10, and not", "python3.10 -m venv"),
        ("thor", "TensorRT 10.13.3 is installed for the system's Python 3.12", "--system-site-packages"),
        ("agx orin", "TensorRT 10.3.0 is installed, but not its Python module", "sudo apt install python3-libnvinfer"),
        ("desktop", "TensorRT is not installed", "pip install"),
    ):
        (folder := tmp_path / name).mkdir()
        newer, older = diagnose(_read(folder, name), BINDINGS)[2:]
        (problem,) = older.problems
        assert words in problem.what
        assert fix in problem.fix
        # One that is too old for a target is of no use there, seen or not.
        (problem,) = newer.problems
        assert ("is older than 10.15" in problem.what) == (name != "desktop")


def test_the_power_mode(tmp_path: Path) -> None:
    for name, fix in (
        ("orin nano", ["sudo nvpmodel -m 2 && sudo jetson_clocks"]),
        ("thor", ["sudo nvpmodel -m 0 && sudo jetson_clocks"]),
        ("agx orin", []),
        ("desktop", []),
    ):
        (folder := tmp_path / name).mkdir()
        assert [problem.fix for problem in machine_problems(_read(folder, name))] == fix


def test_precisions() -> None:
    assert precisions("8.7") == ("fp16", "int8", "int4")
    assert precisions("7.5") == ("fp16", "int8")
    assert precisions("11.0") == precisions("12.1") == ("fp16", "int8", "int4", "fp8")
    assert precisions("5.3") == precisions("") == ()
