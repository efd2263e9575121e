"""Which engines are installed, in which versions; nothing here fails when one is missing or broken."""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mllm_edge.runtime.foreign import pass_on

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = ["MINIMUM", "Engine", "engines", "extras", "version_numbers", "wheels"]

# Engine → the modules that may hold it; wheels of TensorRT for RTX bring the second name only.
_MODULES: Mapping[str, Sequence[str]] = {
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "cuda": ("cuda.bindings",),
}
_WHEELS = re.compile(r"(onnxruntime|ort-nightly|tensorrt)", re.I)

# Target → engine → its lowest version; one engine is enough.
MINIMUM: Mapping[str, Mapping[str, str]] = {
    "cpu": {"onnxruntime": "1.23"},
    "cuda": {"onnxruntime": "1.23"},
    "tensorrt": {"tensorrt": "10.15", "tensorrt_rtx": "1.2"},
    "tensorrt-10.3": {"tensorrt": "10.3", "tensorrt_rtx": "1.0"},
}


@dataclass(frozen=True)
class Engine:
    """A module that imports, or why it does not (`problem`); `providers` are ONNX Runtime's."""

    module: str
    version: str = ""
    providers: tuple[str, ...] = ()
    problem: str = ""


def engines() -> dict[str, Engine]:
    """ONNX Runtime, TensorRT, TensorRT for RTX and cuda-bindings; those that are not installed are left out."""
    found = {}
    for name, modules in _MODULES.items():
        engine = next(filter(None, map(_probe, modules)), None)
        if engine is not None:
            found[name] = engine
    return found


def wheels(path: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Installed distributions of engines as "name version", by the package that they bring: onnxruntime, tensorrt,
    tensorrt_rtx_bindings, … `path`: where to look instead of sys.path."""
    found: dict[str, set[str]] = {}
    for distribution in _distributions(path):
        name = distribution.metadata["Name"] or ""
        if _WHEELS.match(name):
            for package in _packages(distribution):
                found.setdefault(package, set()).add(f"{name} {distribution.version}")
    return {package: tuple(sorted(names)) for package, names in sorted(found.items())}


def extras(path: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Extra of mllm-edge → its packages that are missing; empty when mllm-edge runs without being installed."""
    present = {_normal(d.metadata["Name"] or ""): d for d in _distributions(path)}
    itself = present.get("mllm-edge")
    found: dict[str, list[str]] = {}
    for need in (itself.requires if itself else None) or []:
        package, extra = re.match(r"[\w.-]+", need), re.search(r"extra == ['\"]([\w-]+)['\"]", need)
        if package and extra:
            missing = found.setdefault(extra[1], [])
            # One may be there several times, for several versions of Python.
            missing += [package[0]] if _normal(package[0]) not in present and package[0] not in missing else []
    return {extra: tuple(missing) for extra, missing in found.items()}


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers, three at most: 10.3.0.30 and 1.24.0.dev1 as (10, 3, 0) and (1, 24, 0)."""
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits[0]))
    return tuple(numbers)


def _distributions(path: Sequence[str] | None) -> "Iterable[Distribution]":
    from importlib.metadata import distributions  # backends that want versions alone do without

    return distributions() if path is None else distributions(path=list(path))


def _packages(distribution: "Distribution") -> set[str]:
    """Top-level packages by the files with code that it lists; tools beside an engine share its name, not its files."""
    files = [file for file in distribution.files or () if file.name == "__init__.py" and len(file.parts) == 2]
    return {file.parts[0] for file in files}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _probe(module: str) -> Engine | None:
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as e:
        pass_on(e)
        return None if e.name in (module, module.partition(".")[0]) else Engine(module, problem=str(e))
    except Exception as e:  # a native library that does not load raises what it likes
        pass_on(e)
        return Engine(module, problem=str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__)
    providers = loaded.get_available_providers() if hasattr(loaded, "get_available_providers") else ()
    return Engine(module, str(getattr(loaded, "__version__", "")), tuple(providers))
