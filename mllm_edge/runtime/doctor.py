"""Which targets work on this machine, and what stands in the way of the others."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mllm_edge.install import install_hint
from mllm_edge.runtime.backends.cuda import OLD_DRIVER
from mllm_edge.runtime.backends.installed import MINIMUM, Engine, version_numbers
from mllm_edge.runtime.machine.hardware import Machine

__all__ = [
    "EXPORTED",
    "RUNNABLE",
    "Problem",
    "Target",
    "best_target",
    "diagnose",
    "machine_problems",
    "precisions",
    "wheel_problems",
]

# The targets that this version writes graphs for, and those that its backends execute.
EXPORTED = ("cpu", "cuda", "tensorrt", "tensorrt-10.3")
RUNNABLE = ("cpu", "cuda", "tensorrt", "tensorrt-10.3")
# The fastest first.
_PREFERRED = ("tensorrt", "tensorrt-10.3", "cuda", "cpu")
# The oldest compute capability whose kernels TensorRT has for each.
_PRECISIONS = {"fp16": (7, 5), "int8": (7, 5), "int4": (8, 0), "fp8": (8, 9)}
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
    machine: Machine, engines: Mapping[str, Engine], runnable: Collection[str] = RUNNABLE, refused: str = ""
) -> tuple[Target, ...]:
    """The verdict on each target, from what is installed (engine → what was found). `refused`: CUDA's name of what
    keeps cuda-bindings from the GPU."""
    bindings = _bindings(machine, engines, refused)
    found = {
        "cpu": _cpu(engines),
        "cuda": [*_gpu(machine), *_cuda(machine, engines)],
        "tensorrt": [*_gpu(machine), *_tensorrt(machine, engines, "tensorrt"), *bindings],
        "tensorrt-10.3": [*_gpu(machine), *_tensorrt(machine, engines, "tensorrt-10.3"), *bindings],
    }
    return tuple(Target(name, name in EXPORTED, name in runnable, tuple(problems)) for name, problems in found.items())


def best_target(targets: Collection[Target]) -> str:
    """The one to export for and to run here; "" when none works."""
    working = {target.name for target in targets if target.works}
    return next((name for name in _PREFERRED if name in working), "")


def precisions(compute_capability: str) -> tuple[str, ...]:
    """What a GPU computes in or reads weights in; empty where its capability ("8.7") is not known."""
    version = version_numbers(compute_capability)
    return tuple(name for name, oldest in _PRECISIONS.items() if version >= oldest)


def machine_problems(machine: Machine) -> list[Problem]:
    """What makes this machine slower than it is."""
    power = machine.power
    if power is None or power.name == power.fastest:
        return []
    what = f"power mode {power.name} limits the clocks; {power.fastest} does not"
    return [Problem(what, f"sudo nvpmodel -m {power.number} && sudo jetson_clocks")]


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
    return _onnxruntime(engines, "cpu", "CPUExecutionProvider", install_hint("cpu"))


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
    if version_numbers(engine.version) < version_numbers(minimum):
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
    if not found and machine.tensorrt:
        system = Engine("tensorrt", machine.tensorrt)
        return [_too_old(machine, system, _NAMES["tensorrt"], minimum["tensorrt"], target) or _unseen(machine)]
    if not found:
        install = (
            "sudo apt install nvidia-jetpack" if machine.l4t else f"pip install tensorrt, or {install_hint('rtx')}"
        )
        return [Problem("TensorRT is not installed", install)]
    problems = [_too_old(machine, engines[name], _NAMES[name], minimum[name], target) for name in found]
    return [] if None in problems else [problem for problem in problems if problem]


def _unseen(machine: Machine) -> Problem:
    """TensorRT belongs to the system, and virtual environments do not look there unless they are told to."""
    here, seen = "{}.{}".format(*sys.version_info), machine.tensorrt_python
    if not seen:
        what = f"TensorRT {machine.tensorrt} is installed, but not its Python module"
        return Problem(what, "sudo apt install python3-libnvinfer")
    which = "3" if "3" in seen or here in seen else max(seen, key=version_numbers)
    return Problem(
        f"TensorRT {machine.tensorrt} is installed for the system's Python {', '.join(seen)}, and not visible here "
        f"(Python {here})",
        f"make the environment with python{which} -m venv --system-site-packages, and install mllm-edge there",
    )


def _bindings(machine: Machine, engines: Mapping[str, Engine], refused: str) -> list[Problem]:
    """TensorRT's backend reaches CUDA through cuda-bindings."""
    engine, install = engines.get("cuda"), install_hint("jetson" if machine.l4t else "rtx")
    if engine is None:
        return [Problem("cuda-bindings are not installed", install)]
    if engine.problem:
        return [Problem(f"cuda-bindings do not load: {engine.problem}", install)]
    if not refused or not machine.gpus:
        return []
    if refused != OLD_DRIVER:
        return [Problem(f"CUDA finds no GPU: {refused}", "nvidia-smi says more; give a container its GPUs")]
    driver = f"the driver {machine.driver}" if machine.driver else "the driver"
    what = f"{driver} is too old for cuda-bindings {engine.version} ({refused})"
    if machine.jetpack == "6":
        return [Problem(what, 'pip install "cuda-bindings>=12.6,<12.9": later ones bring a CUDA newer than JetPack 6')]
    return [Problem(what, 'update the NVIDIA driver (580 or newer for CUDA 13), or pip install "cuda-bindings<13"')]


def _too_old(machine: Machine, engine: Engine, name: str, minimum: str, target: str) -> Problem | None:
    if engine.problem:
        return Problem(f"{name} does not load: {engine.problem}", f"reinstall {name}")
    if version_numbers(engine.version) >= version_numbers(minimum):
        return None
    stays = machine.jetpack == "6" and target == "tensorrt"
    fix = "export for --target tensorrt-10.3: JetPack 6 stays on TensorRT 10.3" if stays else f"upgrade {name}"
    return Problem(f"{name} {engine.version or 'of unknown version'} is older than {minimum}", fix)
