"""Install hints name what can be installed: a checkout, a wheel, never a name on an index."""

import json
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_edge import install
from mllm_edge.install import install_hint

ROOT = Path(__file__).parents[1]


def remembered(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.setattr(install, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


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

    monkeypatch.setattr(install, "distribution", missing)
    assert '".[cpu]" in the checkout' in install_hint("cpu")


def test_no_hint_names_a_package_that_is_not_published() -> None:
    wrong = re.compile(r"pip install (?:--upgrade )?[\"']?mllm[-_]edge(?!-\d)")
    files = [*ROOT.glob("mllm_edge/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("scripts/*.py")]
    assert [str(f) for f in files if wrong.search(f.read_text(encoding="utf-8"))] == []
