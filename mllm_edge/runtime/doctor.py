"""Which targets work on this machine, and what stands in the way of the others."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mllm_edge.runtime.backends.installed import Engine
from mllm_edge.runtime.machine import Machine

__all__ = ["EXPORTED", "MINIMUM", "RUNNABLE", "Problem", "Target", "diagnose", "wheel_problems"]

# The targets that this version writes graphs for, and those that its backends execute.
EXPORTED = ("cpu", "tensorrt", "tensorrt-10.3")
RUNNABLE = ("cpu",)
# Target → engine → its lowest version; one engine is enough. Repeated here because a device has no exporter.
MINIMUM: Mapping[str, Mapping[str, str]] = {
    "cpu": {"onnxruntime": "1.23"},
    "cuda": {"onnxruntime": "1.23"},
    "tensorrt": {"tensorrt": "10.15", "tensorrt_rtx": "1.2"},
    "tensorrt-10.3": {"tensorrt": "10.3", "tensorrt_rtx": "1.0"},
}
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the line that helps."""

    what: str
    fix: str


@dataclass(frozen=True)
class Target:
    """`exported`: this version writes its graphs; `runs`: it executes them on their own engine. `problems`: what this
    machine lacks for it."""

    name: str
    exported: bool
    runs: bool
    problems: tuple[Problem, ...]

    @property
    def works(self) -> bool:
        """Bundles run here on this target."""
        return self.runs and not self.problems


def diagnose(
    machine: Machine, engines: Mapping[str, Engine], runnable: Collection[str] = RUNNABLE
) -> tuple[Target, ...]:
    """The verdict on each target, from what is installed (engine → what was found)."""
    found = {
        "cpu": _cpu(engines),
        "cuda": [*_gpu(machine), *_cuda(machine, engines)],
        "tensorrt": [*_gpu(machine), *_tensorrt(machine, engines, "tensorrt")],
        "tensorrt-10.3": [*_gpu(machine), *_tensorrt(machine, engines, "tensorrt-10.3")],
    }
    return tuple(Target(name, name in EXPORTED, name in runnable, tuple(problems)) for name, problems in found.items())


def wheel_problems(wheels: Mapping[str, Collection[str]]) -> list[Problem]:
    """Wheels that bring the same package overwrite each other's files (package → "name version")."""
    problems = []
    for package, found in wheels.items():
        if len(found) > 1:
            names = " ".join(wheel.split()[0] for wheel in found)
            what = f"{' and '.join(found)} both hold the package {package} and overwrite each other"
            problems.append(Problem(what, f"pip uninstall {names}, then install the one you need"))
    return problems


def _cpu(engines: Mapping[str, Engine]) -> list[Problem]:
    return _onnxruntime(engines, "cpu", "CPUExecutionProvider", 'pip install "mllm-edge[cpu]"')


def _cuda(machine: Machine, engines: Mapping[str, Engine]) -> list[Problem]:
    install = "pip install onnxruntime-gpu"
    if machine.l4t:  # PyPI's wheels with CUDA are for desktop GPUs
        index = f"jp{machine.jetpack}" if machine.jetpack else "the folder of your JetPack"
        install = (
            f"install onnxruntime-gpu from NVIDIA's index for Jetson, not PyPI: https://pypi.jetson-ai-lab.io, {index}"
        )
    return _onnxruntime(engines, "cuda", "CUDAExecutionProvider", install)


def _onnxruntime(engines: Mapping[str, Engine], target: str, provider: str, install: str) -> list[Problem]:
    engine, minimum = engines.get("onnxruntime"), MINIMUM[target]["onnxruntime"]
    if engine is None:
        return [Problem("ONNX Runtime is not installed", install)]
    if engine.problem:
        return [Problem(f"ONNX Runtime does not load: {engine.problem}", f"pip uninstall it, then {install}")]
    problems = []
    if _version(engine.version) < _version(minimum):
        problems.append(Problem(f"ONNX Runtime {engine.version} is older than {minimum}", f"upgrade it: {install}"))
    if provider not in engine.providers:
        problems.append(Problem(f"ONNX Runtime has no {provider}", f"pip uninstall onnxruntime, then {install}"))
    return problems


def _gpu(machine: Machine) -> list[Problem]:
    if not machine.gpus:
        return [Problem("no NVIDIA GPU is visible", "install the NVIDIA driver, or give the container its GPUs")]
    return []


def _tensorrt(machine: Machine, engines: Mapping[str, Engine], target: str) -> list[Problem]:
    """Nothing when one engine is new enough; else what is wrong with each that is installed."""
    minimum = dict(MINIMUM[target])
    if machine.l4t:  # TensorRT for RTX is not made for Jetson
        minimum.pop("tensorrt_rtx")
    found = [name for name in minimum if name in engines]
    if not found:
        install = "sudo apt install nvidia-jetpack" if machine.l4t else 'pip install tensorrt, or "mllm-edge[rtx]"'
        return [Problem("TensorRT is not installed", install)]
    problems = [_too_old(machine, engines[name], _NAMES[name], minimum[name], target) for name in found]
    return [] if None in problems else [problem for problem in problems if problem]


def _too_old(machine: Machine, engine: Engine, name: str, minimum: str, target: str) -> Problem | None:
    if engine.problem:
        return Problem(f"{name} does not load: {engine.problem}", f"reinstall {name}")
    if _version(engine.version) >= _version(minimum):
        return None
    stays = machine.jetpack == "6" and target == "tensorrt"
    fix = "export for --target tensorrt-10.3: JetPack 6 stays on TensorRT 10.3" if stays else f"upgrade {name}"
    return Problem(f"{name} {engine.version or 'of unknown version'} is older than {minimum}", fix)


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers, three at most: 10.3.0.30 and 1.24.0.dev1 as (10, 3, 0) and (1, 24, 0)."""
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits[0]))
    return tuple(numbers)
