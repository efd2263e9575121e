"""Fixtures of the tests that run on a stand-in for TensorRT and CUDA."""

import shutil
from pathlib import Path

import pytest

from tests.runtime.tensorrt_stand_in import StandIn, install


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A half-precision bundle for both of TensorRT's targets; read only."""
    from mllm_edge.export.pipeline import export
    from tests.tiny import save_tiny_idefics3

    folder = tmp_path_factory.mktemp("single")
    save_tiny_idefics3(folder / "checkpoint")
    targets = ("tensorrt", "tensorrt-10.3")
    export(str(folder / "checkpoint"), folder / "bundle", targets=targets, recipe_name="fp16", verify_mode="off")
    return folder / "bundle"


@pytest.fixture
def bundle(single: Path, tmp_path: Path) -> Path:
    """A copy to build engines in."""
    return Path(shutil.copytree(single, tmp_path / "bundle"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch)
