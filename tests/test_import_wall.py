"""The wall: what the device side may import, by reading the sources and by running it where the rest is missing."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllm_edge"
FOUNDATION = {
    "errors",
    "install",
    "spec",
    "json_form",
    "checksums",
    "files",
    "lock",
    "image_checks",
    "manifest_checks",
    "bundle",
    "loss",
    "progress",
}
# From the ground up: a module imports of its own package what stands before it, or in the same line. What has no line
# stands on the last one of its package.
FLOORS = {
    "": (
        ("foundation",),
        ("graph", "runtime"),
        ("compare",),
        ("calibration",),
        ("export", "report"),
        ("cli",),
    ),
    "runtime": (
        ("arrays", "foreign", "limits", "log", "numbers", "trace", "stopping", "options"),
        ("machine", "onnx_file"),
        ("backends", "prompt"),
        ("decode",),
        ("arguments", "encode", "health", "planning", "turns"),
        ("encoded_image", "recall"),
        ("answer", "guiding", "saved_state"),
        ("scoring",),
        ("asking", "conversation"),
        ("vlm",),
        ("asynchronous", "budget", "build", "doctor"),
        ("profiling",),
    ),
    "graph": (
        ("builder", "chunks", "datafile", "decoder_spec", "gate", "precision", "ranges", "rtn", "scales", "searched"),
        ("linear", "operators"),
        ("dialects",),
    ),
    "export": (
        ("checkpoint",),
        ("decoders", "vision", "known", "loss_questions", "workspace"),
        ("plan", "reference", "targets", "trace"),
        ("family",),
        ("families",),
    ),
}
RUNTIME_LIBRARIES = {"PIL", "jinja2", "numpy", "tokenizers", "xxhash"}
# What an extra installs, and the one file that imports it, within functions.
EXTRAS = {"mllm_edge.runtime.decode.guided": {"llguidance"}, "mllm_edge.runtime.prompt.video_file": {"av"}}
ENGINES = {"cuda", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"}
FORBIDDEN = (
    "av",
    "huggingface_hub",
    "llguidance",
    "matplotlib",
    "ml_dtypes",
    "mllm_edge.calibration",
    "mllm_edge.cli",
    "mllm_edge.export",
    "mllm_edge.report",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
    "torch",
    "transformers",
)
BLOCK = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if any(name == f or name.startswith(f + ".") for f in {FORBIDDEN!r}):
            raise ImportError(f"{{name}} is behind the wall")
sys.meta_path.insert(0, Wall())
"""
MODULES = sorted(
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for p in PACKAGE.rglob("*.py")
)
DEVICE = [m for m in MODULES if m.startswith("mllm_edge.runtime") or m.removeprefix("mllm_edge.") in FOUNDATION]


def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(module: str) -> Iterator[str]:
    """Full names of all that a module imports anywhere; for `from a import b` also a.b, which may be a module."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _roots(module: str) -> set[str]:
    """Top-level names that do not come with Python."""
    return {name.partition(".")[0] for name in _imports(module)} - sys.stdlib_module_names


def _for_type_checkers(module: str) -> set[str]:
    """typing_extensions, which no device has, where it is imported under TYPE_CHECKING alone."""
    names = [
        (node.module, isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for block in _tree(module).body
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
    ]
    unused = all(checked for name, checked in names if name == "typing_extensions")
    return {"typing_extensions"} if unused else set()


def _own(module: str) -> set[str]:
    """Parts of this package that a module imports, as paths below it such as runtime.vlm."""
    return {n.removeprefix("mllm_edge.") for n in _imports(module) if n.startswith("mllm_edge.")}


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment, text=True)


# ---------------------------------------------------------------- by reading
@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_the_foundation_stands_alone(name: str) -> None:
    module = f"mllm_edge.{name}"
    assert _roots(module) <= {"numpy", "xxhash", "mllm_edge"}
    assert {part.partition(".")[0] for part in _own(module)} <= FOUNDATION


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("mllm_edge.runtime")])
def test_the_runtime_imports_only_what_a_device_has(module: str) -> None:
    more = ENGINES if module.startswith("mllm_edge.runtime.backends.") else EXTRAS.get(module, set())
    assert _roots(module) - _for_type_checkers(module) <= RUNTIME_LIBRARIES | more | {"mllm_edge"}
    assert {part.partition(".")[0] for part in _own(module)} <= FOUNDATION | {"runtime"}


@pytest.mark.parametrize("part", ["graph", "calibration"])
def test_quantization_needs_neither_torch_nor_the_exporter(part: str) -> None:
    for module in [m for m in MODULES if m.startswith(f"mllm_edge.{part}")]:
        assert _roots(module).isdisjoint({"torch", "transformers"}), module


def _floor(package: str, name: str) -> int:
    """On which of a package's floors a module stands, by its path below the package."""
    first = name.partition(".")[0]
    if not package and first in FOUNDATION:
        first = "foundation"
    floors = FLOORS[package]
    return next((i for i, names in enumerate(floors) if first in names), len(floors))


@pytest.mark.parametrize("package", FLOORS)
def test_no_floor_imports_a_higher_one(package: str) -> None:
    inside = f"{package}." if package else ""
    for module in [m for m in MODULES if m.startswith(f"mllm_edge.{inside}") and m != "mllm_edge.__main__"]:
        name = module.removeprefix(f"mllm_edge.{inside}")
        files = [part for part in _own(module) if part.startswith(inside) and f"mllm_edge.{part}" in MODULES]
        for other in [part.removeprefix(inside) for part in files]:
            assert _floor(package, other) <= _floor(package, name), f"{module} imports {inside}{other}"


@pytest.mark.parametrize("name", [f"{p}.{n}" if p else n for p, fs in FLOORS.items() for names in fs for n in names])
def test_floors_name_what_is_there(name: str) -> None:
    place = PACKAGE / name.replace(".", "/")
    assert name == "foundation" or place.is_dir() or place.with_suffix(".py").is_file()


def test_no_two_files_import_each_other() -> None:
    """Neither directly nor through others, and for type checking neither."""
    graph = {m: {f"mllm_edge.{n}" for n in _own(m)} & set(MODULES) - {m} for m in MODULES}
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("mllm_edge.cli")])
def test_nobody_imports_the_command_line(module: str) -> None:
    if module == "mllm_edge.__main__":
        assert {part.partition(".")[0] for part in _own(module)} == {"cli"}
    else:
        assert not any(part.partition(".")[0] == "cli" for part in _own(module))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("mllm_edge.cli")])
def test_verbs_import_heavy_things_inside_functions(module: str) -> None:
    light = {"click", "mllm_edge"}
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            assert {a.name.partition(".")[0] for a in node.names} - sys.stdlib_module_names <= light
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            assert name.partition(".")[0] in sys.stdlib_module_names | light
            parts = name.split(".")
            assert parts[0] != "mllm_edge" or parts[1:2] in ([], ["cli"], ["errors"], ["install"]), (
                f"{module} imports {name}"
            )


# ---------------------------------------------------------------- by running
def test_the_device_side_runs_without_the_rest(tiny_bundle: Path) -> None:
    code = BLOCK + (
        "import importlib\n"
        f"for name in {DEVICE!r}:\n"
        "    importlib.import_module(name)\n"
        "import numpy as np\n"
        "from mllm_edge import VLM\n"
        "with VLM.load(sys.argv[1]) as vlm:\n"
        "    image = np.zeros((80, 60, 3), np.uint8)\n"
        "    print(len(vlm.generate('Hi', images=[image], max_new_tokens=4, ignore_eos=True).token_ids))\n"
    )
    done = _run(code, str(tiny_bundle))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"


# What answers do without, and what takes longest to import of that.
LATER = ("email", "http", "importlib.metadata", "numpy.ma", "numpy.random", "ssl", "urllib.request", "zipfile")


def test_a_first_token_waits_for_nothing_that_it_does_without(tiny_bundle: Path) -> None:
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from mllm_edge import VLM\n"
        "with VLM.load(sys.argv[1]) as vlm:\n"
        "    next(iter(vlm.stream('Hi', images=[Image.new('RGB', (60, 80))], max_new_tokens=4)))\n"
        "print(*sys.modules)\n"
    )
    done = _run(code, str(tiny_bundle))
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "onnxruntime" in loaded
    assert not [name for name in loaded if name in LATER or name.startswith("mllm_edge.runtime.planning")]


def test_importing_the_package_is_light() -> None:
    code = "import sys, mllm_edge; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = set(_run(code).stdout.split())
    assert "mllm_edge" in loaded
    heavy = {f.partition(".")[0] for f in FORBIDDEN} - {"mllm_edge"} | RUNTIME_LIBRARIES | ENGINES
    assert loaded.isdisjoint(heavy)


def test_importing_vlm_opens_no_engine() -> None:
    done = _run(BLOCK + "from mllm_edge import VLM; print('onnxruntime' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_unknown_attribute_of_the_package() -> None:
    import mllm_edge

    images = {"BGR", "EncodedImage", "FrameWindow", "Pixels", "Video", "VideoFile"}
    assert set(mllm_edge.__all__) == images | {"AsyncVLM", "VLM", "Cancel", "Chunk", "Result", "__version__"}
    assert all(getattr(mllm_edge, name) for name in mllm_edge.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = mllm_edge.nothing_like_it


# ---------------------------------------------------------------- public names
def _public(module: str) -> set[str]:
    """Functions and classes of a module without a leading underscore."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in _tree(module).body if isinstance(n, kinds) and not n.name.startswith("_")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "mllm_edge.__main__"])
def test_all_is_complete_and_importable(module: str) -> None:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(loaded, name), f"{module}.__all__ names {name}, which is not there"
    assert _public(module) <= set(names), f"{module}.__all__ lacks {_public(module) - set(names)}"
