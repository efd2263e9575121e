"""Files that are missing or damaged and wrong places: each error names what, where and what to do, and nothing is left
behind."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import (
    ExportError,
    ParityError,
    SourceError,
    UnsupportedModelError,
    WeightsError,
)
from mllm_edge.export import export_job, pipeline, workspace
from mllm_edge.export.pipeline import export
from tests.export.damage import assert_fails, edit_json, edit_weights
from tests.tiny import save_tiny_idefics3


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_unknown_architecture_names_the_nearest(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(model_type="smolvlm3"))
    assert_fails(checkpoint, UnsupportedModelError, "'smolvlm3'", "the nearest is smolvlm", "config.json")


def test_config_key_without_effect_on_the_reference_is_accepted(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update(neftune_noise_alpha=5.0))
    assert export(str(checkpoint), tmp_path / "out", dry_run=True).nbytes > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_file_that_is_missing(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert_fails(checkpoint, SourceError, name)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "processor_config.json"])
def test_file_that_is_not_json(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text('{"cut off": ')
    assert_fails(checkpoint, SourceError, name)


@pytest.mark.parametrize("keep", [0.5, 0.001, 0.0])
def test_truncated_safetensors(checkpoint: Path, keep: float) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert_fails(checkpoint, WeightsError, "model.safetensors", "download")


def test_safetensors_with_a_broken_header(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(data)
    assert_fails(checkpoint, WeightsError, "header is broken")


def test_missing_shard(tmp_path: Path) -> None:
    checkpoint = tmp_path / "sharded"
    save_tiny_idefics3(checkpoint, shard_size="300KB")
    next(checkpoint.glob("model-00002*")).unlink()
    assert_fails(checkpoint, WeightsError, "model-00002", "missing")


def test_pickled_checkpoint_says_how_to_convert(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert_fails(checkpoint, WeightsError, "pytorch_model.bin", "save_pretrained")


def test_directory_and_hub_id_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_fails(tmp_path / "nowhere", SourceError, "no such directory")
    with pytest.raises(SourceError, match=r"no such directory, and the hub has not delivered it"):
        export("someone/something", tmp_path / "out")


def test_unknown_target_and_recipe(checkpoint: Path) -> None:
    assert_fails(checkpoint, ExportError, "'gpu'", "cpu", targets=["gpu"])
    with pytest.raises(ValueError, match="fp32, fp16, int8, int4"):
        export(str(checkpoint), checkpoint.parent / "out", recipe_name="int5")


def test_no_disk_space(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(checkpoint)._replace(free=1_000_000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    assert_fails(checkpoint, ExportError, "1 MB free", "free some space")


def test_no_disk_space_for_the_graphs_that_are_compared_in_float32(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = export(str(checkpoint), tmp_path / "out", recipe_name="int8", dry_run=True).nbytes
    free = nbytes + pipeline._OTHER_FILES + workspace._RESERVE + 1000
    usage = shutil.disk_usage(checkpoint)._replace(free=free)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    words = ("its comparison with the source", "free some space")
    assert_fails(checkpoint, ExportError, *words, recipe_name="int8", verify_mode="auto")
    export(str(checkpoint), tmp_path / "out", recipe_name="int8", verify_mode="off")


def test_disk_that_fills_up_on_the_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "decoder.onnx.data")

    monkeypatch.setattr(export_job, "save_model", full)
    assert_fails(checkpoint, ExportError, "decoder.onnx.data", "No space left on device")


def test_out_exists(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert_fails(checkpoint, ExportError, "exists already", "--force")
    (out / "precious.txt").write_text("mine")
    assert_fails(checkpoint, ExportError, "not a bundle", force=True)
    assert (out / "precious.txt").read_text() == "mine"


def test_failed_export_leaves_the_old_bundle(checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    edit_weights(checkpoint, lambda w: w.pop("model.text_model.norm.weight"))
    assert_fails(checkpoint, WeightsError, force=True)
    Bundle.load(out).verify()


def test_directories_made_on_the_way_vanish_with_a_failed_export(checkpoint: Path, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_job, "save_model", fail)
        with pytest.raises(ExportError, match="No space left"):
            export(str(checkpoint), tmp_path / "a" / "b" / "out", verify_mode="off")
    assert not (tmp_path / "a").exists()
    export(str(checkpoint), tmp_path / "a" / "b" / "out", verify_mode="off")
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").is_file()


def test_successful_export_replaces_the_old_bundle(checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    export(str(checkpoint), out, recipe_name="int8", force=True, verify_mode="off")
    bundle = Bundle.load(out)
    bundle.verify()
    assert bundle.manifest.recipe["name"] == "int8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_leftovers_of_a_killed_export_are_cleared(checkpoint: Path, tmp_path: Path) -> None:
    abandoned = tmp_path / ".out.export-999999999"
    abandoned.mkdir()
    export(str(checkpoint), tmp_path / "out", verify_mode="off")
    assert not abandoned.exists()


def test_value_beyond_half_precision(checkpoint: Path) -> None:
    def grow(weights: dict[str, np.ndarray]) -> None:
        weights["model.text_model.layers.0.mlp.down_proj.weight"][3, 5] = 1e5

    edit_weights(checkpoint, grow)
    assert_fails(checkpoint, ExportError, "layers.0.down_proj", "65504", recipe_name="fp16")


def test_graph_that_disagrees_with_the_source_fails(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.export.vision import siglip

    right = siglip.position_ids
    monkeypatch.setattr(siglip, "position_ids", lambda patches, grid: right(patches, grid)[::-1])
    assert_fails(checkpoint, ParityError, "vision_encoder", "0.0001", verify_mode="full")


def test_dry_run_writes_nothing_and_tells_the_size(checkpoint: Path, tmp_path: Path) -> None:
    report = export(str(checkpoint), tmp_path / "out", recipe_name="int4", dry_run=True)
    assert not (tmp_path / "out").exists()
    written = export(str(checkpoint), tmp_path / "out", recipe_name="int4", verify_mode="off")
    data = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.data"))
    estimated = report.nbytes - report.components["embed_tokens"]
    assert estimated == pytest.approx(data, rel=0.5)  # tiny tensors are padded to pages
    assert report.components == written.components


def test_large_model_is_compared_by_its_first_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_idefics3(tmp_path / "checkpoint", text={"num_hidden_layers": 4})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(tmp_path / "checkpoint"), tmp_path / "out", recipe_name="fp32")
    assert report.parity["scope"] == "decoder: first 2 layers and head"
    assert report.parity["errors"]["decode_logits"] < 1e-4
    bundle = Bundle.load(tmp_path / "out")
    bundle.verify()
    assert len(bundle.manifest.model.state[0].layers) == 4
    assert not any("probe" in name for name in bundle.manifest.files)
