"""`mllm-edge compare`, and the arithmetic below it."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from mllm_edge.bundle import Bundle, write_manifest
from mllm_edge.checksums import file_entry
from mllm_edge.compare.cases import synthetic_cases
from mllm_edge.compare.compare import TOLERANCES, summarize
from mllm_edge.compare.outputs import LOGITS, Outputs
from mllm_edge.export.pipeline import export
from mllm_edge.export.verify import limits_of
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.families.parity import FLOAT32_TARGETS

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def coarse(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model at int4."""
    out = tmp_path_factory.mktemp("coarse") / "bundle"
    export(str(tiny_checkpoint), out, recipe_name="int4", verify_mode="off")
    return out


@pytest.fixture(scope="module")
def everywhere(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for all targets, at fp32."""
    out = tmp_path_factory.mktemp("everywhere") / "bundle"
    export(str(tiny_checkpoint), out, targets=FLOAT32_TARGETS, recipe_name="fp32", verify_mode="off")
    return out


@pytest.mark.parametrize("target", [name for name in FLOAT32_TARGETS if name != "cpu"])
@pytest.mark.parametrize("with_source", [False, True])
def test_a_named_target(
    cli: Cli, everywhere: Path, tiny_checkpoint: Path, target: str, with_source: bool, monkeypatch
) -> None:
    opened: list[str] = []
    load = OnnxRuntimeCpu.open
    monkeypatch.setattr(OnnxRuntimeCpu, "open", lambda s, path, v: (opened.append(path.name), load(s, path, v))[1])
    first = tiny_checkpoint if with_source else everywhere
    result = cli("compare", first, everywhere, "--target", target, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["target"] == target
    assert 0 < data["errors"]["decode_logits"] < 1e-3
    assert data["greedy_agreement"] == 1.0
    expected = {f"{name}.{target}.onnx" for name in ("vision_encoder", "connector", "decoder")}
    assert {name for name in opened if name.count(".") > 1} == expected
    assert f"({target}) against" in cli("compare", first, everywhere, "--target", target, "--prompt", "Hi").stdout


def test_a_target_that_the_bundle_lacks(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("compare", tiny_bundle, tiny_bundle, "--target", "tensorrt")
    assert result.exit_code == 1
    assert "no variant for target 'tensorrt'" in result.stderr
    assert "--target tensorrt" in result.stderr.splitlines()[-1]


def test_tolerances_are_the_exporters_limits() -> None:
    """Of the recipes that have such a limit: those that quantize are judged by their loss."""
    limits = {name: limits_of(name, ("connector", *LOGITS)) for name in TOLERANCES}
    assert {name: found.pop("connector", None) for name, found in limits.items() if found} == {
        "fp32": 1e-4,
        "fp16": 2e-2,
    }
    whole = {name: dict.fromkeys(LOGITS, TOLERANCES[name]) for name in ("fp32", "fp16")}
    assert limits == {**whole, "int8": {}, "int4": {}}


def test_the_same_files_have_no_error(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("compare", tiny_bundle, tiny_bundle, "--tolerance", "0", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    names = ("vision_encoder", "connector", "prefill_logits", "decode_logits")
    assert list(data["errors"].items()) == [(name, 0.0) for name in names]
    assert (data["kl"], data["greedy_agreement"], data["greedy_tokens"], data["within"]) == (0.0, 1.0, 48, True)
    assert len(data["cases"]) == 3


def test_another_recipe_differs(cli: Cli, tiny_bundle: Path, coarse: Path) -> None:
    result = cli("compare", tiny_bundle, coarse, "--json")
    data = json.loads(result.stdout)
    assert data["tolerance"] == TOLERANCES["int4"]
    assert all(0 < error < 1 for error in data["errors"].values())
    assert data["kl"] > 0
    strict = cli("compare", tiny_bundle, coarse, "--tolerance", "1e-6")
    assert strict.exit_code == 1
    assert "more than the tolerance of 1e-06" in strict.stderr
    for word in ("vision_encoder", "connector", "prefill_logits", "decode_logits", "KL", "greedy tokens agree"):
        assert word in strict.stdout


def test_given_prompts_and_images(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    result = cli(
        "compare", tiny_bundle, tiny_bundle, "--prompt", "Hi", "--prompt", "Ho", "--image", image_file, "--json"
    )
    data = json.loads(result.stdout)
    assert data["cases"] == [f"'Hi', {image_file}", f"'Ho', {image_file}"]
    assert "connector" in data["errors"]
    text = json.loads(cli("compare", tiny_bundle, tiny_bundle, "--prompt", "Hi", "--json").stdout)
    assert set(text["errors"]) == {"prefill_logits", "decode_logits"}


@pytest.mark.parametrize("swapped", [False, True])
def test_against_the_source(cli: Cli, tiny_checkpoint: Path, tiny_bundle: Path, swapped: bool) -> None:
    pair = (tiny_checkpoint, tiny_bundle) if not swapped else (tiny_bundle, tiny_checkpoint)
    result = cli("compare", *pair, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["reference"] == str(tiny_checkpoint)
    assert data["tolerance"] == TOLERANCES["fp32"]
    assert 0 < data["errors"]["decode_logits"] < 1e-3
    assert data["greedy_agreement"] == 1.0


def test_the_source_needs_the_exporter(cli: Cli, tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    result = cli("compare", tiny_bundle, tiny_checkpoint)
    assert result.exit_code == 1
    assert "pip install" in result.stderr
    assert "[export]" in result.stderr


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m["model"]["image"].update(height=32), "image processing"),
        (lambda m: m["model"].update(vocab_size=999), "vocab_size"),
    ],
)
def test_different_models(cli: Cli, tiny_bundle: Path, tmp_path: Path, change: Callable, word: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = cli("compare", tiny_bundle, other)
    assert result.exit_code == 1
    assert word in result.stderr


def test_different_tokenizers(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    data = (other / "tokenizer.json").read_text(encoding="utf-8").replace("<row_6_col_6>", "<row_6_col_7>")
    (other / "tokenizer.json").write_text(data, encoding="utf-8")
    manifest = Bundle.load(tiny_bundle).manifest
    files = {**manifest.files, "tokenizer.json": file_entry(other / "tokenizer.json")}
    write_manifest(other, replace(manifest, files=files))
    result = cli("compare", tiny_bundle, other)
    assert result.exit_code == 1
    assert "different tokenizers" in result.stderr


def test_two_checkpoints_and_none(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "both checkpoints" in cli("compare", tiny_checkpoint, tiny_checkpoint).stderr
    assert cli("compare", tmp_path, tmp_path).exit_code == 1


def test_arithmetic() -> None:
    case = synthetic_cases(False)
    ids, hidden = np.array([1, 2]), np.array([3.0, 4.0])
    right, off = {"vision_encoder": hidden, "connector": hidden}, hidden + np.array([0.0, 0.5])
    a = Outputs(ids, np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([1, 1]), right)
    b = Outputs(ids, np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([1, 0]), {**right, "vision_encoder": off})
    found = summarize("a", "b", case, [a], [b], 0.5)
    assert found.errors == pytest.approx(
        {"vision_encoder": 0.1, "connector": 0, "prefill_logits": 0, "decode_logits": 1}
    )
    assert (found.greedy_agreement, found.within) == (0.5, False)
    p, q = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum(), np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum()
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()) / 2)
    broken = Outputs(ids, np.full((2, 2), np.nan), np.array([0, 0]), right)
    assert not summarize("a", "b", case, [a], [broken], 1e9).within
