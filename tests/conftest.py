"""Fixtures shared by all tests: one tiny checkpoint and one bundle of it, made once."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.export.damage", "tests.families.parity")


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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(family, config)`: the tiny checkpoint that a row of `families/rows/` saves with this config, its first if
    none is told; made once, and read only."""
    from tests.families.row import rows

    folder = tmp_path_factory.mktemp("saved")

    @cache
    def save(family: str, config: str) -> Path:
        row = rows()[family]
        row.save(folder / family / config, **row.configs[config])
        return folder / family / config

    return lambda family, config="": save(family, config or rows()[family].first)


@pytest.fixture(scope="session")
def floats(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`floats(family)`: the float32 bundle of a row's first config for every target that has one; read only."""
    from mllm_edge.export.pipeline import export
    from tests.families.parity import FLOAT32_TARGETS

    folder = tmp_path_factory.mktemp("floats")

    @cache
    def made(family: str) -> Path:
        export(str(saved(family)), folder / family, targets=FLOAT32_TARGETS, recipe_name="fp32", verify_mode="off")
        return folder / family

    return made


@pytest.fixture(scope="session")
def fours(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`fours(family)`: an int4 bundle of a row's first config for the CPU; read only."""
    from mllm_edge.export.pipeline import export

    folder = tmp_path_factory.mktemp("fours")

    @cache
    def made(family: str) -> Path:
        export(str(saved(family)), folder / family, recipe_name="int4", verify_mode="off")
        return folder / family

    return made


@pytest.fixture(scope="session")
def compared(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`compared(family, config, recipe)`: the report and the bundle for all targets that there is a form for, of an
    export that was compared with its source in each; read only. Which layers of `int4` get more bits, for which all of
    them are measured, is left to tests/export/test_more_bits.py, and without these a tiny model may lose much."""
    from dataclasses import replace

    from mllm_edge.calibration.recipes import RECIPES
    from mllm_edge.export.pipeline import export
    from tests.families.row import rows

    folder = tmp_path_factory.mktemp("compared")

    @cache
    def made(family: str, config: str, recipe: str) -> tuple[Any, Path]:
        out = folder / f"{family}-{config}-{recipe}"
        targets = rows()[family].reached
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RECIPES, recipe, replace(RECIPES[recipe], more_bits_above=None))
            return export(str(saved(family, config)), out, targets=targets, recipe_name=recipe, allow_loss=True), out

    return made


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Towers of the same settings, which many tests export, are traced once in a process: nothing writes to a trace."""
    from mllm_edge.export import export_job

    plain, kept, patch = export_job.trace, dict[str, Any](), pytest.MonkeyPatch()

    def trace(component: Any, *types: Any) -> Any:
        if not kept:
            _read_operators_once(patch)
        made = component.module
        settings = [_settings(cell.cell_contents) for cell in made.__closure__ or ()]
        key = repr(
            (made.__module__, made.__code__.co_firstlineno, settings, component.inputs, component.outputs, types)
        )
        if " at 0x" in key:  # of something whose settings it does not tell
            return plain(component, *types)
        if key not in kept:
            kept[key] = plain(component, *types)
        return kept[key]

    patch.setattr(export_job, "trace", trace)
    yield
    patch.undo()


def _settings(value: Any) -> Any:
    """A function that holds nothing is told by its name."""
    plain = isinstance(value, FunctionType) and not value.__closure__
    return f"{value.__module__}.{value.__qualname__}" if plain else value


def _read_operators_once(patch: pytest.MonkeyPatch) -> None:
    """torch reads the sources of its 500 ONNX operators for each export anew, half a second of most of ours; nothing
    that we ask of it changes them."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))


@pytest.fixture
def proves(record_property: Callable[[str, object], None]) -> Callable[[str, str, Iterable[str]], None]:
    """`proves(family, kind, values)`: what the test has shown of a family, see `tests/proven.py`."""
    from tests.proven import proves_with

    return proves_with(record_property)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the quick tier alone, see tests/quick.py")


def pytest_configure(config: pytest.Config) -> None:
    """Several processes send their reports to one."""
    from tests.proven import Proven

    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Proven(config))


@pytest.fixture
def rounded_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    """An int4 that loses what people notice on tiny models: plain rounding, everywhere."""
    from dataclasses import replace

    from mllm_edge.calibration.recipes import RECIPES
    from mllm_edge.graph.precision import BLOCKS_4

    monkeypatch.setitem(RECIPES, "int4", replace(RECIPES["int4"], decoder=BLOCKS_4, more_bits_above=None))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share fixtures go to one process: those of a file, but for groups that it makes itself."""
    from tests.quick import is_quick

    if config.option.quick:
        left_out = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_quick(item)]
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
