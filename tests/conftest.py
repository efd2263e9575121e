"""Fixtures shared by all tests: one tiny checkpoint and one bundle of it, made once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Idefics3 checkpoint; read only."""
    from tests.tiny import save_tiny_idefics3

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_tiny_idefics3(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle of it; read only."""
    from mllm_edge.export.pipeline import export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(str(tiny_checkpoint), out, recipe_name="fp32")
    return out


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Towers of the same settings, which many tests export, are traced once in a process: nothing writes to a trace."""
    from mllm_edge.export import export_job

    plain, kept = export_job.trace, dict[str, Any]()

    def trace(component: Any, *types: Any) -> Any:
        made = component.module
        settings = [cell.cell_contents for cell in made.__closure__ or ()]
        key = repr(
            (made.__module__, made.__code__.co_firstlineno, settings, component.inputs, component.outputs, types)
        )
        if " at 0x" in key:  # of something whose settings it does not tell
            return plain(component, *types)
        if key not in kept:
            kept[key] = plain(component, *types)
        return kept[key]

    export_job.trace = trace
    yield
    export_job.trace = plain


@pytest.fixture
def rounded_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    """An int4 that loses what people notice on tiny models: plain rounding, everywhere."""
    from dataclasses import replace

    from mllm_edge.calibration.recipes import RECIPES
    from mllm_edge.graph.precision import BLOCKS_4

    monkeypatch.setitem(RECIPES, "int4", replace(RECIPES["int4"], decoder=BLOCKS_4, more_bits_above=None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share fixtures go to one process: those of a file, but for groups that it makes itself."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
