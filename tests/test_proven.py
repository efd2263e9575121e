"""The list of what is proven, and the page made of it."""

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_edge.export.family import families
from tests.families.row import rows
from tests.proven import FILE, KINDS, Proven, proves_with


def test_every_family_is_proven() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert set(found) == {family.name for family in families().values()}
    for family, proven in found.items():
        assert set(proven) == set(KINDS)
        assert set(proven["targets"]) == set(rows()[family].reached)
        assert set(proven["precisions"]) >= {"fp32", "fp16", "int8", "int4"}
        assert {"decoder", "vision_encoder"} <= set(proven["components"])


def ended(tmp_path: Any, passed: list[tuple[str, str]], exitstatus: int = 0, **options: Any) -> tuple[Any, Any]:
    """A session of two tests, and what the file should say."""
    chosen = {"keyword": "", "markexpr": "", "collectonly": False, "quick": False, **options}
    source: Any = pytest.Config.ArgsSource.TESTPATHS
    plugin = Proven(SimpleNamespace(option=SimpleNamespace(**chosen), args_source=source, rootpath=tmp_path))  # type: ignore[arg-type]
    for outcome, what in passed:
        report: Any = SimpleNamespace(when="call", passed=outcome == "passed", user_properties=[("proven", what)])
        plugin.pytest_runtest_logreport(report)
    session: Any = SimpleNamespace(exitstatus=exitstatus)
    plugin.pytest_sessionfinish(session, exitstatus)
    return session, tmp_path / "build" / FILE.name


def test_what_did_not_pass_is_not_proven(tmp_path: Any) -> None:
    session, file = ended(tmp_path, [("passed", "a targets cpu"), ("failed", "a targets cuda")])
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert json.loads(file.read_text()) == {"a": {"targets": ["cpu"]}}


@pytest.mark.parametrize(
    ("exitstatus", "options"), [(1, {}), (0, {"keyword": "x"}), (0, {"collectonly": True}), (0, {"quick": True})]
)
def test_a_part_of_the_tests_says_nothing(tmp_path: Any, exitstatus: int, options: dict[str, Any]) -> None:
    session, file = ended(tmp_path, [("passed", "a targets cpu")], exitstatus, **options)
    assert session.exitstatus == exitstatus
    assert not file.exists()


def test_what_is_proven_is_of_a_known_kind() -> None:
    said: list[tuple[str, object]] = []
    proves = proves_with(lambda name, value: said.append((name, value)))
    proves("a", "targets", ["cpu", "cuda"])
    assert said == [("proven", "a targets cpu"), ("proven", "a targets cuda")]
    with pytest.raises(AssertionError):
        proves("a", "colours", ["red"])


def test_the_page_says_the_same() -> None:
    spec = importlib.util.spec_from_file_location("families_page", FILE.parents[2] / "scripts" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "python scripts/families.py"
