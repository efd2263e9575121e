"""`mllm-edge inspect`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.json_form import to_json
from mllm_edge.runtime.backends.engine_facts import FOLDER, write_engine

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


def test_verify_reads_engines_too(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (copy / FOLDER).mkdir()
    engine = copy / FOLDER / "decoder.engine"
    write_engine(engine, memoryview(bytes(3 << 20)), {"device": "sm87"}, {"max_seq": 64})
    assert cli("inspect", copy, "--verify").exit_code == 0
    data = bytearray(engine.read_bytes())
    data[100_000] = 1
    engine.write_bytes(data)
    result = cli("inspect", copy, "--verify")
    assert result.exit_code == 1
    assert "decoder.engine: the engine differs from what was built" in result.stderr
    assert f"rm {engine}" in result.stderr
    assert cli("inspect", copy).exit_code == 0


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


def test_parity_of_every_target(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    other = {**manifest["parity"], "target": "tensorrt", "errors": {"decode_logits": 0.0123}}
    manifest["parity"]["targets"] = {"tensorrt": other}
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    text = cli("inspect", copy).stdout
    assert "parity of cpu (whole)" in text
    assert "1.2e-02" in text.split("parity of tensorrt (whole)")[1]


def test_memory_is_what_a_call_allocates(cli: Cli, tiny_bundle: Path) -> None:
    (needs,) = json.loads(cli("inspect", tiny_bundle, "--context", "256", "--json").stdout)["memory"]
    with VLM.load(tiny_bundle) as vlm:  # short calls allocate 256 positions
        assert needs["kv_cache"] == vlm.generate("Hi", max_new_tokens=2).metrics.kv_cache_bytes
    files = Bundle.load(tiny_bundle).manifest.files
    assert needs["weights"] == {
        name: files[f"{name}.onnx"].nbytes + files[f"{name}.onnx.data"].nbytes
        for name in ("vision_encoder", "connector", "decoder")
    }
    assert needs["cross_kv"] == 0
    assert needs["resident"] == sum(needs["weights"].values()) + needs["kv_cache"]
    assert needs["mapped"] == files["embed_tokens.npy"].nbytes
    text = cli("inspect", tiny_bundle, "--context", "256").stdout
    for word in ("memory for 256 tokens (cpu)", "KV cache", "resident", "read from disk"):
        assert word in text


def test_image_tokens_are_those_of_a_call(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    by_file = json.loads(cli("inspect", tiny_bundle, "--image", image_file, "--json").stdout)["image"]
    by_size = json.loads(cli("inspect", tiny_bundle, "--image-size", "60x90", "--json").stdout)["image"]
    assert by_file == by_size
    with VLM.load(tiny_bundle) as vlm:
        metrics = vlm.generate("", image_file, max_new_tokens=1).metrics
    assert (by_file["tiles"], by_file["image_tokens"]) == (metrics.tiles, metrics.image_tokens)
    assert by_file["prompt_tokens"] == metrics.prompt_tokens
    assert by_file["left"] == 1024 - metrics.prompt_tokens
    assert (by_file["height"], by_file["width"]) == (60, 90)
    assert f"{metrics.image_tokens} image tokens" in cli("inspect", tiny_bundle, "--image", image_file).stdout


@pytest.mark.parametrize("size", ["60", "0x9", "-1x9", "axb", "9999999x1"])
def test_sizes_that_are_none(cli: Cli, tiny_bundle: Path, size: str) -> None:
    result = cli("inspect", tiny_bundle, f"--image-size={size}")
    assert result.exit_code == 2
    assert "480x640" in result.stderr


def test_questions_that_have_no_answer(cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path) -> None:
    assert "context of 1024" in cli("inspect", tiny_bundle, "--context", "1025").stderr
    assert "cannot be processed" in cli("inspect", tiny_bundle, "--image-size", "99999x99999").stderr
    assert cli("inspect", tiny_bundle, "--image", tmp_path / "absent.png").exit_code == 1
    assert cli("inspect", tiny_bundle, "--image", image_file, "--image-size", "1x1").exit_code == 2
