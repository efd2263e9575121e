"""Tests that share fixtures go to one process, which is what makes the whole suite affordable."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.families.row import rows
from tests.quick import FAMILIES, LONG, family_of, is_quick


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
def test_the_tests_of_a_file_are_a_group(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith(f"@{request.node.path.as_posix()}")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
@pytest.mark.xdist_group("of-its-own")
def test_others_make_their_own(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@of-its-own")


def test_the_quick_tier_has_two_families(request: pytest.FixtureRequest) -> None:
    """And the files that it leaves out are there."""
    here = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert here >= LONG
    assert set(FAMILIES) < set(rows())
    item = request.node
    assert family_of(item) is None
    assert is_quick(item)
    for family, quick in (("qwen2_vl", True), ("qwen2_5_vl", False), ("llava", False), ("idefics3", True)):
        other = SimpleNamespace(path=Path("test_rows.py"), iter_markers=lambda _, f=family: [mark(f"bundle-{f}")])
        assert family_of(other) == family  # type: ignore[arg-type]
        assert is_quick(other) == quick  # type: ignore[arg-type]


def mark(group: str) -> pytest.Mark:
    return pytest.mark.xdist_group(group).mark
