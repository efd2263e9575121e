"""`doctor --checkpoint`: what an export would do, without doing it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

Cli = Callable[..., Any]


def report(cli: Cli, folder: Path, *options: str, code: int = 0) -> dict:
    before = sorted(p.name for p in folder.parent.rglob("*"))
    result = cli("doctor", "--checkpoint", folder, "--json", *options)
    assert result.exit_code == code, result.output
    assert sorted(p.name for p in folder.parent.rglob("*")) == before
    return json.loads(result.stdout)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "m"))


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**data, **changes}))


def test_checkpoint_in_order(cli: Cli, folder: Path) -> None:
    found = report(cli, folder)
    assert found["exports"]
    assert found["family"] == "idefics3"
    assert found["stored"]["float32"] > 20
    assert found["notices"] == found["refusals"] == []
    costs = found["costs"]
    assert costs["fp32"]["bits"] == 32.0
    assert costs["int4"]["bits"] < costs["int8"]["bits"] < costs["fp16"]["bits"] == pytest.approx(16, abs=0.2)
    assert costs["int4"]["bundle"] < costs["int8"]["bundle"] < costs["fp32"]["bundle"]
    assert found["export_seconds"] > 0


def test_sizes_are_those_of_the_export(cli: Cli, folder: Path, tmp_path: Path) -> None:
    from mllm_edge.export.pipeline import export

    costs = report(cli, folder)["costs"]
    for name in ("fp32", "int8", "int4"):
        done = export(str(folder), tmp_path / "out", recipe_name=name, dry_run=True)
        assert costs[name]["token"] == done.components["decoder"]
        assert costs[name]["bundle"] == pytest.approx(done.nbytes, rel=0.1)


def test_everything_that_stands_in_the_way_is_told_at_once(cli: Cli, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit(folder / "tokenizer_config.json", bos_token={"of": "no use"})
    found = report(cli, folder, code=1)
    told = " ".join(refusal["what"] for refusal in found["refusals"])
    assert "safetensors" in told
    assert "tokenizer" in told
    assert all(refusal["fix"] for refusal in found["refusals"])


def test_contradictions_are_told(cli: Cli, folder: Path) -> None:
    edit(folder / "special_tokens_map.json", eos_token="<|im_start|>")
    assert "special_tokens_map.json" in " ".join(report(cli, folder)["notices"])


def test_unused_weight(cli: Cli, folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.audio_tower.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (refusal,) = report(cli, folder, code=1)["refusals"]
    assert "model.audio_tower.weight" in refusal["what"]


def test_unknown_family(cli: Cli, folder: Path) -> None:
    edit(folder / "config.json", model_type="smolvlm9")
    found = report(cli, folder, code=1)
    assert found["family"] is None
    assert "nearest is smolvlm" in found["refusals"][0]["fix"]


@pytest.mark.parametrize("save", [tiny.save_tiny_llava, tiny.save_tiny_qwen2_vl])
def test_other_families(cli: Cli, tmp_path: Path, save: object) -> None:
    save(tmp_path / "m")
    assert report(cli, tmp_path / "m")["exports"]


def test_text(cli: Cli, folder: Path) -> None:
    edit(folder / "special_tokens_map.json", eos_token="<|im_start|>")
    text = cli("doctor", "--checkpoint", folder).stdout
    for word in ("family          idefics3", "note: ", "int4", "next: mllm-edge export"):
        assert word in text
    edit(folder / "config.json", model_type="smolvlm9")
    result = cli("doctor", "--checkpoint", folder)
    assert result.exit_code == 1
    assert "refused: " in result.stdout
    assert "next:" not in result.stdout


def test_no_directory(cli: Cli, tmp_path: Path) -> None:
    result = cli("doctor", "--checkpoint", "owner/name")
    assert result.exit_code != 0
    assert "no such directory" in result.stderr
    assert cli("doctor", "--adapter", tmp_path).exit_code == 2
