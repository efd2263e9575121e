"""FastVLM: the tower of the tests' reference against timm's, and what an export says where there is none."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.timm_wrapper import modeling_timm_wrapper

from mllm_edge.errors import ConfigError
from mllm_edge.export.pipeline import export
from tests.families.rows.fast_vlm import CONFIGS
from tests.families.timm_tower import pixels
from tests.fastvit_reference import create_model
from tests.tiny_fast_vlm import save_tiny_fast_vlm

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "build" / "timm", ROOT / "build" / "torchvision")
NAMES = ("few_layers", "larger_images_no_template")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        save_tiny_fast_vlm(folder / name, **CONFIGS[name])
    return folder


@pytest.fixture(scope="module")
def of_timm(checkpoints: Path) -> dict[str, np.ndarray]:
    """What `timm_tower.py` writes."""
    for package in PACKAGES:
        if not (package / package.name).is_dir():
            pytest.fail("timm's tower needs timm and torchvision in folders of their own: make build/timm/.installed")
    out = checkpoints.with_name("timm.npz")
    path = os.pathsep.join(map(str, (ROOT, *PACKAGES)))
    command = [sys.executable, "-m", "tests.families.timm_tower", str(checkpoints), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_timm(checkpoints: Path, of_timm: dict[str, np.ndarray], name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoints / name, dtype=torch.float32).eval()
    with torch.no_grad():
        features = model.model.get_image_features(pixels(), return_dict=True).pooler_output.numpy()
    assert np.linalg.norm(features - of_timm[name]) <= 1e-5 * np.linalg.norm(of_timm[name])


def test_published_tower_has_the_tensors_of_timm(of_timm: dict[str, np.ndarray]) -> None:
    with torch.device("meta"):
        tower = create_model("fastvit_mci3", pretrained=False, num_classes=0, inference_mode=True)
    shapes = sorted(f"{name} {list(tensor.shape)}" for name, tensor in tower.state_dict().items())
    assert shapes == of_timm["shapes"].tolist()


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
