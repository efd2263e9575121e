"""`mllm-edge inspect`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from mllm_edge.bundle import Bundle
from mllm_edge.spec import to_json

Cli = Callable[..., Result]


def test_shows_everything(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    manifest = Bundle.load(tiny_bundle).manifest
    for name, component in manifest.components.items():
        assert f"{name}: cpu, contrib, {component.variants[0].precision}" in result.stdout
    for name, entry in manifest.files.items():
        assert name in result.stdout
        assert entry.sha256[:12] in result.stdout
    for error in manifest.parity["errors"]:
        assert error in result.stdout
    for fact in ("idefics3", "context 1024", "recipe     fp32", "onnxruntime >= ", "torch", "past_key_values.0.key …"):
        assert fact in result.stdout


def test_json_is_the_manifest(cli: Cli, tiny_bundle: Path) -> None:
    data = json.loads(cli("inspect", tiny_bundle, "--json").stdout)
    assert data["manifest"] == to_json(Bundle.load(tiny_bundle).manifest)
    assert data["nbytes"] == Bundle.load(tiny_bundle).nbytes
    assert data["verified"] is False


def test_verify_accepts_what_was_exported(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle, "--verify")
    assert result.exit_code == 0
    assert "every file is as it was exported" in result.stdout
    assert json.loads(cli("inspect", tiny_bundle, "--verify", "--json").stdout)["verified"] is True


def test_verify_finds_one_changed_byte(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    path = copy / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert cli("inspect", copy).exit_code == 0
    result = cli("inspect", copy, "--verify")
    assert result.exit_code == 1
    assert "decoder.onnx.data differs" in result.stderr
    assert result.stdout == ""


def test_a_missing_file(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / "tokenizer.json").unlink()
    result = cli("inspect", copy)
    assert result.exit_code == 1
    assert "tokenizer.json is missing" in result.stderr


def test_works_without_measurements(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest.update(parity={}, accuracy={}, provenance={}, recipe={})
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = cli("inspect", copy)
    assert result.exit_code == 0, result.stderr
    assert "not measured" in result.stdout
