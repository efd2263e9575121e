"""`mllm-edge quantize` as a user meets it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mllm_edge.calibration.recipes import CALIBRATED, RECIPES
from mllm_edge.cli import quantize as verb
from mllm_edge.export.pipeline import export
from tests.cli.test_main import Cli
from tests.tiny import save_tiny_idefics3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    save_tiny_idefics3(folder / "model")
    export(str(folder / "model"), folder / "fp16", recipe_name="fp16", verify_mode="off")
    (folder / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (50 + i, 40), (20 * i, 90, 200)).save(folder / "images" / f"{i}.png")
    return folder


def test_recipes_are_those_of_calibration() -> None:
    assert set(verb.RECIPES) <= {*RECIPES, *CALIBRATED}


def test_folder_of_images_to_a_bundle_with_its_proof(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    result = cli("quantize", str(folder / "fp16"), str(out), "--data", str(folder / "images"), "--prompt", "What?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    for words in (
        "6 samples and 128 built-in questions; proof on 2 others",
        "KL divergence",
        "likeliest token agrees",
        "layers with the largest",
    ):
        assert words in result.stderr
    assert f"next: mllm-edge run {out}" in result.stderr
    assert json.loads((out / "manifest.json").read_text())["recipe"]["name"] == "int4"


def test_json_report(cli: Cli, folder: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "int8", "--data", str(folder / "images"), "--held-back", "3", "--json"]
    result = cli("quantize", str(folder / "fp16"), str(tmp_path / "out"), *arguments)
    report = json.loads(result.stdout)
    assert (report["recipe"], report["samples"], report["held_back"]) == ("int8", 5, 3)
    assert report["proof"]["nbytes"][1] == report["nbytes"] or report["nbytes"] > 0
    assert report["seconds"] > 0


def test_a_missed_gate_fails(cli: Cli, folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder / "images"), "--max-kl", "0"]
    result = cli("quantize", str(folder / "fp16"), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert "error: KL divergence" in result.stderr
    assert "fix: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "gone"], "gone does not exist"),
        (["--data", "images", "--recipe", "int5"], "unknown recipe 'int5'"),
        (["--data", "images", "--recipe", "gone.toml"], "gone.toml"),
        (["--prompt", "What?"], "--prompt needs --data"),
        (["--skip-bad"], "--skip-bad needs --data"),
        (["--no-builtin-text"], "--no-builtin-text leaves nothing to calibrate with"),
    ],
)
def test_wrong_input_is_told(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(folder)
    result = cli("quantize", "fp16", str(tmp_path / "out"), *arguments)
    assert result.exit_code != 0
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_export_calibrates_with_data(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--recipe", "mixed", "--data", str(folder / "images"), "--target", "tensorrt", "--json"]
    result = cli("export", str(folder / "model"), str(out), *arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["proof"]["samples"] == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "mixed"
    assert [v["target"] for v in manifest["components"]["decoder"]["variants"]] == ["cpu", "tensorrt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-agreement", "1"], "--min-agreement needs --data"),
        (["--held-back", "1"], "--held-back needs --data"),
        (["--no-builtin-text"], "--no-builtin-text needs --data"),
        (["--recipe", "mixed"], "without --data, --recipe is one of fp32, fp16, int8, int4, not 'mixed'"),
        (["--data", "images", "--dry-run"], "--dry-run does not calibrate"),
    ],
)
def test_options_that_need_data(cli: Cli, folder: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = cli("export", str(folder / "model"), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_pictures_are_listed(cli: Cli, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(folder / "images", data)
    (data / "3.png").write_bytes(b"")
    result = cli("quantize", str(folder / "fp16"), str(tmp_path / "out"), "--data", str(data))
    assert result.exit_code == 1
    assert "3.png" in result.stderr
    assert "--skip-bad" in result.stderr
    result = cli("quantize", str(folder / "fp16"), str(tmp_path / "out"), "--data", str(data), "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert "left out, an image cannot be read (1):\n  " in result.stderr
    assert "3.png" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["typo", "out", "--data", "images"], "typo: no such directory"),
        (["images", "out", "--data", "images"], "images is no bundle"),
        (["fp16/manifest.json", "out", "--data", "images"], "manifest.json is a file"),
        (["fp16", "fp16", "--data", "images"], "fp16 exists already"),
        (["fp16", "images/0.png/out", "--data", "images"], "0.png is a file"),
        (["fp16", "out", "--data", "model"], "model holds no image files"),
        (["fp16", "out", "--data", "gone"], "gone does not exist"),
    ],
)
def test_places_are_checked_before_anything_is_loaded(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(verb, "load_exporter", None)  # would fail
    result = cli("quantize", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "fix: " in result.stderr
    assert not (folder / "out").exists()


def test_too_little_space_is_told_before_anything_is_loaded(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "load_exporter", None)  # would fail
    monkeypatch.setattr("mllm_edge.export.workspace.room", lambda path: 1_000_000)
    result = cli("quantize", str(folder / "fp16"), str(tmp_path / "out"), "--data", str(folder / "images"))
    assert result.exit_code == 1
    assert "1 MB free, the bundle needs" in result.stderr
