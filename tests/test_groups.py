"""Tests that share fixtures go to one process, which is what makes the whole suite affordable."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
def test_the_tests_of_a_file_are_a_group(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith(f"@{request.node.path.as_posix()}")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
@pytest.mark.xdist_group("of-its-own")
def test_others_make_their_own(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@of-its-own")
