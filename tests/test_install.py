"""Install hints name what can be installed: a checkout, a wheel, never a name on an index."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mllm_edge.install import install_hint

ROOT = Path(__file__).parents[1]


def remembered(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("file:///opt/mllm%20edge", "/opt/mllm edge"),
        ("file:///opt/dist/mllm_edge-0.1.0-py3-none-any.whl", "/opt/dist/mllm_edge-0.1.0-py3-none-any.whl"),
    ],
)
def test_where_it_came_from(monkeypatch: pytest.MonkeyPatch, url: str, place: str) -> None:
    remembered(monkeypatch, json.dumps({"url": url, "dir_info": {}}))
    assert install_hint("cpu") == f'pip install "{place}[cpu]"'
    assert install_hint("cpu", "jetson") == f'pip install "{place}[cpu,jetson]"'
    assert install_hint() == f'pip install "{place}"'


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"url": 3}', '{"url": "https://example.org/x.git"}'])
def test_place_that_is_not_known(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    remembered(monkeypatch, text)
    assert '".[export]" in the checkout' in install_hint("export")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert '".[cpu]" in the checkout' in install_hint("cpu")


def test_no_hint_names_a_package_that_is_not_published() -> None:
    wrong = re.compile(r"pip install (?:--upgrade )?[\"']?mllm[-_]edge(?!-\d)")
    files = [*ROOT.glob("mllm_edge/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("scripts/*.py")]
    assert [str(f) for f in files if wrong.search(f.read_text(encoding="utf-8"))] == []


# ---------------------------------------------------------------- what the extras for GPUs resolve to
# Extra → where it is installed: Python, architecture, the C library's version. JetPack 6 has 3.10, JetPack 7 3.12.
PLACES = {
    ("jetson", "3.10", "aarch64", "2_35"): "12.8.0",
    ("jetson", "3.12", "aarch64", "2_39"): "13.0.0",
    ("rtx", "3.12", "x86_64", "2_35"): "13.0.0",
    ("rtx", "3.12", "aarch64", "2_39"): "13.0.0",
}


def needs(extra: str, python: str, architecture: str) -> list[Requirement]:
    """What an extra needs there, the marks evaluated: pip evaluates them for the Python that it runs on."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.M)
    where = {"python_version": python, "platform_machine": architecture}
    found = [Requirement(need) for need in re.findall(r'"([^"]+)"', line)]
    return [need for need in found if need.marker is None or need.marker.evaluate(where)]


@pytest.mark.parametrize(("place", "version"), PLACES.items())
def test_bindings_that_the_driver_bears(place: tuple[str, ...], version: str) -> None:
    (bindings,) = [need for need in needs(*place[:3]) if need.name == "cuda-bindings"]
    assert Version(version) in bindings.specifier
    if place[1] == "3.10":  # JetPack 6: later ones bring a runtime that its driver is too old for
        assert not any(Version(newer) in bindings.specifier for newer in ("12.9.0", "12.9.10", "13.0.0"))


@pytest.mark.skipif("MLLM_EDGE_INDEX" not in os.environ, reason="asks the package index; set MLLM_EDGE_INDEX=1")
@pytest.mark.parametrize("place", PLACES)
def test_the_index_has_wheels(place: tuple[str, ...], tmp_path: Path) -> None:
    _, python, architecture, libc = place
    wanted = [f"{need.name}{need.specifier}" for need in needs(*place[:3])]
    least = 17  # of the C library, 2.17
    libcs = [f"manylinux_2_{minor}_{architecture}" for minor in range(least, int(libc.partition("_")[2]) + 1)]
    platforms = [word for name in (*libcs, f"manylinux2014_{architecture}") for word in ("--platform", name)]
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--only-binary=:all:"]
    options += ["--target", str(tmp_path), "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, *platforms, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    chosen = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(done.stdout)["install"]}
    assert chosen["cuda-bindings"].startswith("12.8" if python == "3.10" else "13.")
