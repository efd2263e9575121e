"""The wheel: exactly the package, its metadata, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from mllm_edge import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy of the sources, tests and examples included."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mllm_edge", "optimum", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "demo.py", source / "examples")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    done = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_name_and_size(wheel: Path) -> None:
    assert wheel.name == f"mllm_edge-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000


def test_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"mllm_edge-{__version__}.dist-info/"
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mllm_edge").rglob("*.py")}
    others = (
        "py.typed",
        "calibration/builtin_text.json",
        "export/checkpoint/tokenizer_corpus.json",
        "export/proven.json",
        "export/systems.json",
        "graph/onnxruntime_cuda.json",
        "graph/tensorrt_10_3.json",
        "report/report.html",
        "runtime/profiling/profile.schema.json",
    )
    data = {f"mllm_edge/{name}" for name in others}
    data.add("optimum/commands/register/register_mllm_edge.py")
    assert {n for n in names if not n.startswith(info)} == modules | data
    assert f"{info}licenses/LICENSE" in names


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "mllm-edge"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    kinds = {"calibrate", "export", "guidance", "optimum", "report", "test", "video"}
    extras = kinds | {"cpu", "jetson", "rtx", "tensorrt"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_the_base_is_small(metadata: Message) -> None:
    needs = metadata.get_all("Requires-Dist", [])
    base = {_name(n) for n in needs if "extra ==" not in n}
    assert base == {"click", "jinja2", "numpy", "pillow", "tokenizers", "xxhash"}
    assert {_name(n) for n in needs if 'extra == "cpu"' in n} == {"onnxruntime"}


def test_the_export_extra_has_what_the_exporter_checks_for(metadata: Message) -> None:
    from mllm_edge.cli.exporter import NEEDED

    needs = metadata.get_all("Requires-Dist", [])
    extra = {_name(n).replace("-", "_") for n in needs if 'extra == "export"' in n}
    assert extra == set(NEEDED)


def test_the_optimum_extra(metadata: Message) -> None:
    """Optimum 2 is the first whose folders are all namespace packages, which other distributions may add to."""
    needs = [n for n in metadata.get_all("Requires-Dist", []) if 'extra == "optimum"' in n]
    assert {n.split(";")[0].strip() for n in needs} == {"mllm-edge[export]", "optimum>=2.0"}


def test_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "mllm-edge = mllm_edge.cli:main" in archive.read(name).decode("utf-8")


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _name(requirement: str) -> str:
    return requirement.split(";")[0].split(">")[0].split("<")[0].split("=")[0].strip()
