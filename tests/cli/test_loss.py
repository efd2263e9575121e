"""The loss of a bundle as `export`, `quantize` and `inspect` tell it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.cli import export as export_verb
from mllm_edge.cli import quantize as quantize_verb
from mllm_edge.export.pipeline import export
from mllm_edge.loss import MAX_KL, headline
from tests.cli.test_main import Cli


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def half(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    export(str(tiny_checkpoint), out, recipe_name="fp16", verify_mode="off")
    return out


def test_the_help_states_the_default(cli: Cli) -> None:
    for verb in (export_verb, quantize_verb):
        option = next(o for o in verb.command.params if o.name == "max_kl")
        assert f"default: {MAX_KL:g}." in option.help


@pytest.mark.usefixtures("rounded_int4")
def test_export_ends_with_the_loss_and_inspect_shows_it(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("export", tiny_checkpoint, out)
    assert result.exit_code == 0, result.stderr
    loss = Bundle.load(out).manifest.accuracy["loss"]
    shown = cli("inspect", out).stdout
    for text in (result.stderr, shown):
        assert f"\nloss: {headline(loss)}\n  asked:       What makes a good neighbour?\n  float model: " in text
        assert "\n  this bundle: " in text
    assert "(8 bits: KL " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("warning: this bundle answers differently")
    assert json.loads(cli("inspect", out, "--json").stdout)["manifest"]["accuracy"]["loss"] == loss


@pytest.mark.usefixtures("rounded_int4")
def test_json_has_the_loss(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = json.loads(cli("export", tiny_checkpoint, tmp_path / "out", "--json").stdout)
    assert report["loss"] == Bundle.load(tmp_path / "out").manifest.accuracy["loss"]
    assert "--recipe int8" in report["warning"]


def test_a_loss_that_is_not_allowed(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = cli("export", tiny_checkpoint, tmp_path / "out", "--max-kl", "0.001")
    assert result.exit_code == 1
    assert "error: quantization loses too much: KL 0." in result.stderr
    assert "  fix: use --recipe int8, or calibrate: mllm-edge quantize" in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = cli("export", tiny_checkpoint, tmp_path / "out", "--max-kl", "0.001", "--allow-loss")
    assert result.exit_code == 0, result.stderr


def test_a_loss_that_was_not_measured(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = cli("export", tiny_checkpoint, tmp_path / "out", "--verify", "off")
    line = (
        f"loss not measured: nothing was compared (--verify off); measure it with: mllm-edge compare {tiny_checkpoint} "
    )
    assert line in result.stderr
    assert line in cli("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize("demand", [["--max-kl", "1"], ["--allow-loss"]])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--recipe", "fp16"], "--recipe fp16 does not quantize"), (["--verify", "off"], "leave out --verify off")],
)
def test_demands_on_what_is_not_measured(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, demand: list[str], arguments: list[str], words: str
) -> None:
    result = cli("export", tiny_checkpoint, tmp_path / "out", *demand, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert demand[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_quantize_tells_the_same(cli: Cli, half: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "rounded.toml"
    recipe.write_text('[decoder]\nmethod = "rtn"\nbits = 3\n', encoding="utf-8")
    arguments = ["--data", str(data), "--recipe", str(recipe), "--prompt", "What?"]
    refused = cli("quantize", half, tmp_path / "out", *arguments, "--max-kl", "0.01")
    assert refused.exit_code == 1
    for part in ("error: KL divergence ", "> 0.01", "the float model answers", "--allow-loss"):
        assert part in refused.stderr
    assert not (tmp_path / "out").exists()
    result = cli("quantize", half, tmp_path / "out", *arguments, "--allow-loss", "--json")
    assert result.exit_code == 0, result.stderr
    report, accuracy = json.loads(result.stdout), Bundle.load(tmp_path / "out").manifest.accuracy
    assert accuracy["loss"] == report["loss"]
    assert report["loss"]["kl"] == report["proof"]["kl"] > 0.1
    assert 0 < report["loss"]["kl_8_bits"] < 0.1 * report["loss"]["kl"]
    assert 0.9 < report["loss"]["agreement_8_bits"] <= 1
    assert report["loss"]["question"] == "What?"
    assert report["loss"]["answer_before"] != report["loss"]["answer_after"]
    assert "--recipe int8" in report["warning"]
    assert "give more samples" in result.stderr.splitlines()[-1]
    assert f"loss: {headline(report['loss'])}" in cli("inspect", tmp_path / "out").stdout


def test_quantize_has_the_same_default(
    cli: Cli, half: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm_edge.export import quantize

    monkeypatch.setattr(quantize, "MAX_KL", 1e-6)
    arguments = ["--data", str(data), "--recipe", "int8"]
    refused = cli("quantize", half, tmp_path / "out", *arguments)
    assert refused.exit_code == 1
    assert "> 1e-06" in refused.stderr
    assert "loss: KL" in cli("quantize", half, tmp_path / "out", *arguments, "--max-kl", "1").stderr


def test_families_say_where_a_loss_is_told(cli: Cli) -> None:
    assert "mllm-edge inspect BUNDLE" in cli("families").stdout


def test_more_bits_are_told(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the export, its JSON, the manifest and `inspect`."""
    monkeypatch.setitem(RECIPES, "int4", replace(RECIPES["int4"], more_bits_above=1e-6))
    result = cli("export", tiny_checkpoint, tmp_path / "out", "--allow-loss", "--json")
    assert result.exit_code == 0, result.stderr
    (notice,) = json.loads(result.stdout)["notices"]
    assert notice.startswith("int4 everywhere costs KL ")
    assert f"note: {notice}" in result.stderr
    shown = cli("inspect", tmp_path / "out").stdout
    assert f"note: {notice}" in shown
    assert re.search(r"recipe     int4\n  8-bit blocks of 128: decoder: layers\.\d(-\d)?\.\w+_proj", shown)


def test_inspect_shows_a_proof_in_lines_that_can_be_read(cli: Cli, half: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads(cli("quantize", half, tmp_path / "out", "--data", data, "--allow-loss", "--json").stdout)
    shown = cli("inspect", tmp_path / "out").stdout
    assert max(map(len, shown.splitlines())) < 250
    proof = report["proof"]
    for line in (f"kl {proof['kl']:.4g}", f"positions {proof['positions']}", "layers with the largest error error"):
        assert line in " ".join(shown.split())
    assert f"{proof['components']['vision_encoder']['sqnr']:.1f} dB" in shown
