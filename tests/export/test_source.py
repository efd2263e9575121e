"""Hub downloads, against a cache directory laid out as the hub client does."""

import shutil
from pathlib import Path

import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.export.pipeline import export
from mllm_edge.export.source import open_source

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id that the cache answers without a network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--maker--tiny"
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "maker/tiny"


def test_hub_id_is_resolved_to_a_commit(hub: str) -> None:
    source = open_source(hub)
    assert source.revision == REVISION
    assert source.model_type == "idefics3"


def test_bundle_of_a_hub_model_records_where_it_came_from(hub: str, tmp_path: Path) -> None:
    export(hub, tmp_path / "out", verify_mode="off")
    provenance = Bundle.load(tmp_path / "out").manifest.provenance
    assert provenance["source"] == "maker/tiny"
    assert provenance["revision"] == REVISION
