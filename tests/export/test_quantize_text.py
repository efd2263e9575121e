"""Calibration on text: the built-in one alone, beside the user's samples, and the user's own without images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import MANIFEST, Bundle
from mllm_edge.calibration import builtin as builtin_module
from mllm_edge.calibration import inputs
from mllm_edge.calibration.data import Sample
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import QuantizeReport, quantize
from tests.tiny import save_tiny_idefics3

TEXTS = [{"prompt": f"Question {i}?"} for i in range(8)]


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save_tiny_idefics3(folder / "model")
    export(str(folder / "model"), folder / "fp32", recipe_name="fp32", verify_mode="off")
    return folder / "fp32"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve questions in the place of 128, four beside others."""
    monkeypatch.setattr(inputs, "builtin_samples", lambda count=12: builtin_module.builtin_samples(count))
    monkeypatch.setattr(inputs, "_BESIDE", 4)


def pictures(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"images": [random.integers(0, 256, (40, 64, 3), dtype=np.uint8)], "prompt": f"Belt {i}?"} for i in range(count)
    ]


def precisions(report: QuantizeReport) -> dict[str, str]:
    components = Bundle.load(Path(report.out)).manifest.components
    return {name: component.variants[0].precision for name, component in components.items()}


def test_no_data_is_the_built_in_text(float_bundle: Path, tmp_path: Path) -> None:
    report = quantize(float_bundle, tmp_path / "out")
    assert (report.samples, report.builtin, report.held_back) == (0, 9, 3)
    assert report.without_images == {"vision encoder": "int8_dynamic", "connector": "int8_dynamic"}
    assert precisions(report) == {
        "vision_encoder": "int8_dynamic",
        "connector": "int8_dynamic",
        "decoder": "int4_blocks",
    }
    assert set(report.layers) == {"vision_encoder", "connector", "decoder"}
    assert report.layers["decoder"]
    assert not report.layers["vision_encoder"]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["recipe"]["vision"]["kind"] == "int8_dynamic"
    assert (manifest["accuracy"]["calibration_samples"], manifest["accuracy"]["builtin_samples"]) == (0, 9)


@pytest.mark.parametrize("recipe", ["int8", "mixed", "fp8", "w4a8"])
def test_text_calibrates_the_decoder_of_every_recipe(float_bundle: Path, tmp_path: Path, recipe: str) -> None:
    report = quantize(float_bundle, tmp_path / "out", recipe=recipe, data=TEXTS, builtin=False)
    assert (report.samples, report.builtin, report.held_back) == (6, 0, 2)
    assert set(report.without_images.values()) == {"int8_dynamic"}
    assert precisions(report)["vision_encoder"] == "int8_dynamic"
    assert recipe == "mixed" or report.layers["decoder"]


def test_built_in_text_joins_what_the_user_has(
    float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Sample]] = []
    key = inputs.work_key
    monkeypatch.setattr("mllm_edge.export.quantize.work_key", lambda *a: (seen.append(a[2]), key(*a))[1])
    report = quantize(float_bundle, tmp_path / "both", data=pictures(8))
    assert (report.samples, report.builtin, report.held_back) == (6, 4, 2)
    assert report.without_images == {}
    assert precisions(report)["vision_encoder"] == "int8_static"
    assert report.proof.components  # the user's own images prove it
    assert [bool(sample.images) for sample in seen[0]] == [True] * 6 + [False] * 4
    report = quantize(float_bundle, tmp_path / "own", data=pictures(8), builtin=False)
    assert (report.samples, report.builtin) == (6, 0)
