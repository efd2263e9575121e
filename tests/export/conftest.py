"""Fixtures of the tests that export and quantize."""

from collections.abc import Iterator

import pytest

from mllm_edge.export import quantize_source


@pytest.fixture(scope="package", autouse=True)
def little_text_beside() -> Iterator[None]:
    """Four questions of the built-in text join a test's samples, not 48."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_source, "_BESIDE", 4)
        yield
