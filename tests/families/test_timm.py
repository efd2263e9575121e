"""Towers of timm: those of the tests' reference against timm's own, and what an export says where there is none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.timm_wrapper import modeling_timm_wrapper

from mllm_edge.errors import ConfigError
from mllm_edge.export.pipeline import export
from tests.families.row import rows
from tests.families.timm_tower import PUBLISHED, features, of_timm, published, shapes
from tests.timm_reference import create_model

# Family and config.
NAMES = (
    "fast_vlm.few_layers",
    "fast_vlm.larger_images_no_template",
    "perception_lm.tiles_and_the_whole",
    "perception_lm.without_class_token",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        family, config = name.split(".")
        rows()[family].save(folder / name, **rows()[family].configs[config])
    return folder


@pytest.fixture(scope="module")
def found(checkpoints: Path) -> dict[str, np.ndarray]:
    return of_timm(checkpoints)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_timm(checkpoints: Path, found: dict[str, np.ndarray], name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoints / name, dtype=torch.float32).eval()
    assert np.linalg.norm(features(model) - found[name]) <= 1e-5 * np.linalg.norm(found[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_have_the_tensors_of_timm(found: dict[str, np.ndarray], name: str) -> None:
    with torch.device("meta"):
        tower = create_model(name, pretrained=False, num_classes=0, **published(name))
    assert shapes(tower) == found[f"shapes.{name}"].tolist()


def test_without_timm_the_error_names_it(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("TimmWrapperModel requires the timm library")

    checkpoint = saved("fast_vlm")
    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", missing)
    with pytest.raises(ConfigError, match="timm") as e:
        export(str(checkpoint), tmp_path / "out")
    assert "pip install timm" in str(e.value)
