"""Where a model comes from: a local directory or a hub id, its configuration and its weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_edge.errors import SourceError
from mllm_edge.export.checkpoint import own_lora
from mllm_edge.export.checkpoint.adapter_files import Adapter, open_adapters
from mllm_edge.export.checkpoint.download import download
from mllm_edge.export.checkpoint.files import local_path, read_json
from mllm_edge.export.checkpoint.notices import Notices
from mllm_edge.export.checkpoint.safetensors import open_files
from mllm_edge.export.checkpoint.weights import weight_files

__all__ = ["Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `name` is what the user typed, `revision` the hub's commit (None for a local directory);
    `adapters` are merged into the weights in their order; whoever reads a file adds to `notices` what the user should
    know about it."""

    name: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    adapters: tuple[Adapter, ...] = ()
    notices: Notices = field(default_factory=Notices, compare=False)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has a class for the checkpoint."""
        from transformers import CONFIG_MAPPING

        return self.model_type in CONFIG_MAPPING

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, {} when it is absent; raises SourceError when it is broken."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}


def open_source(
    model: str,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Source:
    """A local directory with config.json, or else a hub id `owner/name` (downloaded into the hub's own cache), and
    LoRA adapters, likewise. One that lies in the folder comes first, unless "none" is among `adapters`. `tell` hears
    the source's notices as they come.

    Raises SourceError when one of them cannot be had, ConfigError for an adapter that cannot be merged.
    """
    folder = local_path(model)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(
                f"{model}: a directory has no revision {revision!r}",
                "leave out --revision, or name the hub id owner/name",
            )
    else:
        _check_id(model)
        folder, revision = download(model, revision)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no config.json here", "name a transformers checkpoint directory or a hub id")
    notices = Notices(tell)
    config = read_json(folder / "config.json")
    opened = open_adapters(folder, adapters, notices, config.get("model_type"))
    if any(config.get(key) for key in own_lora.RANKS.values()):
        config = own_lora.with_merged_settings(config, open_files(weight_files(folder, config)), folder)
    return Source(model, folder, revision, config, opened, notices)


def _check_id(model: str) -> None:
    """Raise SourceError for what is no hub id and so was meant as a path."""
    if local_path(model).is_file():
        raise SourceError(
            f"{model}: a file, not a directory", "name the directory of the checkpoint that it belongs to"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~", "file:")):
        raise SourceError(f"{model}: no such directory", "give a checkpoint directory, or a hub id like owner/name")
