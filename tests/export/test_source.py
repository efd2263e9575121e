"""Where a model comes from: paths, and hub downloads against stand-ins for the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from mllm_edge.bundle import Bundle
from mllm_edge.errors import ConfigError, SourceError, WeightsError
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.source import Source, open_source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.export.pipeline import export
from tests.tiny import save_tiny_llava

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


# ---------------------------------------------------------------- what is taken from a repository
class Repository:
    """Stands for the hub: delivers the files that the patterns let through into a snapshot."""

    def __init__(self, files: Path, snapshot: Path, listed: bool, monkeypatch: pytest.MonkeyPatch):
        self._files, self._snapshot = files, snapshot
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        self._listed = listed

    def download(self, repo: str, allow_patterns: Any = None, ignore_patterns: Any = None, **_: Any) -> str:
        names = list(self.list_repo_files("", listed=True))
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self._snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._files / name, self._snapshot / name)
        return str(self._snapshot)

    def list_repo_files(self, repo: str, listed: bool | None = None, **_: Any) -> list[str]:
        if not (self._listed if listed is None else listed):
            raise ConnectionError("offline")
        return [p.relative_to(self._files).as_posix() for p in self._files.rglob("*") if p.is_file()]

    @property
    def taken(self) -> set[str]:
        return {p.relative_to(self._snapshot).as_posix() for p in self._snapshot.rglob("*") if p.is_file()}


MakeRepository = Callable[..., Repository]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRepository:
    def make(files: Path, listed: bool = True) -> Repository:
        snapshot = tmp_path / REVISION
        snapshot.mkdir()
        return Repository(files, snapshot, listed, monkeypatch)

    return make


COPIES = [
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "original/model.safetensors",
    "original/config.json",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/tokenizer.json",
    "checkpoint-500/model-00001-of-00002.safetensors",
    "onnx/model.onnx",
    "pytorch_model.bin",
    "trainer_state.json",
    "model-Q4.gguf",
]


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_one_copy_of_the_weights_is_taken(tiny_checkpoint: Path, tmp_path: Path, repository: MakeRepository) -> None:
    files = Path(shutil.copytree(tiny_checkpoint, tmp_path / "files"))
    needed = {p.name for p in files.iterdir()} | {"additional_chat_templates/tools.jinja", "added_tokens.json"}
    add(files, "additional_chat_templates/tools.jinja", "added_tokens.json", *COPIES)
    add(files, "model-00001-of-00002.safetensors", "model.safetensors.index.json")  # transformers takes the one file
    hub = repository(files)
    source = open_source("maker/tiny")
    assert hub.taken == needed | {"model.safetensors.index.json"}
    assert source.revision == REVISION


def test_shards_are_those_of_the_index(tmp_path: Path, repository: MakeRepository) -> None:
    files = tmp_path / "files"
    save_tiny_llava(files, shard_size="200KB")
    needed = {p.name for p in files.iterdir()}
    add(files, *COPIES, "model-00001-of-00099.safetensors")
    hub = repository(files)
    assert len(source_weights(open_source("maker/tiny")).unused()) > 0
    assert hub.taken == needed


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_repository_of_pickled_weights(
    tiny_checkpoint: Path, tmp_path: Path, repository: MakeRepository, listed: bool, name: str
) -> None:
    files = Path(shutil.copytree(tiny_checkpoint, tmp_path / "files", ignore=shutil.ignore_patterns("*.safetensors")))
    add(files, name)
    hub = repository(files, listed)
    with pytest.raises(WeightsError, match="pickled") as caught:
        open_source("maker/tiny")
    assert "maker/tiny" in str(caught.value)
    assert (name in str(caught.value)) == listed
    assert name not in hub.taken


def test_repository_in_another_layout(tiny_checkpoint: Path, tmp_path: Path, repository: MakeRepository) -> None:
    files = Path(shutil.copytree(tiny_checkpoint, tmp_path / "files", ignore=shutil.ignore_patterns("*.safetensors")))
    add(files, "consolidated.safetensors")
    repository(files)
    with pytest.raises(WeightsError, match=r"only consolidated\.safetensors"):
        open_source("maker/tiny")


# ---------------------------------------------------------------- paths
def test_paths_as_people_write_them(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "a model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/a model", (tmp_path / "a model").as_uri(), f"file:{tmp_path / 'a model'}"):
        assert open_source(name).folder == tmp_path / "a model"
    export("~/a model", tmp_path / "out", verify_mode="off")
    assert Bundle.load(tmp_path / "out").manifest.provenance["source"] == "a model"


@pytest.mark.parametrize("name", ["~/nowhere", "file:///nowhere", "/no/where", "./no/where", "~nobody-here/x", "a/b/c"])
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(SourceError, match=r"no such (home )?directory"):
        open_source(name)


def test_a_file_is_no_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="a file, not a directory"):
        open_source(str(tiny_checkpoint / "model.safetensors"))


def test_a_directory_has_no_revision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no revision 'main'") as caught:
        export(str(tiny_checkpoint), tmp_path / "out", revision="main")
    assert "--revision" in caught.value.fix
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- config.json
@pytest.fixture
def edited(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Source]:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "edited"))

    def edit(change: Callable[[dict[str, Any]], Any]) -> Source:
        config = json.loads((tiny_checkpoint / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return open_source(str(folder))

    return edit


def test_a_type_that_transformers_does_not_know_is_not_answered_with_all_that_it_knows(
    edited: Callable[..., Source],
) -> None:
    source = edited(lambda c: c["text_config"].update(model_type="lama"))
    with pytest.raises(ConfigError, match="lama") as caught:
        load_config(source)
    assert len(str(caught.value)) < 400
    assert "the nearest that it knows is llama" in caught.value.fix


def test_a_type_at_the_top_that_transformers_does_not_know(edited: Callable[..., Source]) -> None:
    with pytest.raises(ConfigError, match="internvl_chat") as caught:
        load_config(edited(lambda c: c.update(model_type="internvl_chat")))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "tie_word_embeddings", "hidden_act"])
def test_null_where_transformers_takes_none(edited: Callable[..., Source], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        load_config(edited(lambda c: c["text_config"].update({key: None})))
    assert "null is no value" in caught.value.fix


def test_null_where_transformers_takes_it(edited: Callable[..., Source], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(architectures=None, dtype=None, quantization_config=None, transformers_weights=None)
        config["text_config"].update(head_dim=None, bos_token_id=None, rope_scaling=None)

    source = edited(change)
    assert export(str(source.folder), tmp_path / "out", recipe_name="fp32").parity["greedy_agreement"] == 1


@pytest.mark.parametrize(("named", "told"), [(["GPT2LMHeadModel"], True), ([], False), ("x", False), (None, False)])
def test_architectures_that_contradict_the_type(edited: Callable[..., Source], named: Any, told: bool) -> None:
    source = edited(lambda c: c.update(architectures=named))
    load_config(source)
    assert ("GPT2LMHeadModel" in "".join(source.notices)) == told
