"""Fixtures of the tests that export and quantize."""

from collections.abc import Iterator

import pytest

from mllm_edge.calibration import inputs


@pytest.fixture(scope="package", autouse=True)
def little_text_beside() -> Iterator[None]:
    """Four questions of the built-in text join a test's samples, not 48."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_BESIDE", 4)
        yield
