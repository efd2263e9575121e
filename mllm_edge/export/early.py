"""What can be told before anything heavy is imported: whether the source, the data and the place for the result are."""

import shlex
from pathlib import Path

from mllm_edge.bundle import MANIFEST
from mllm_edge.errors import SourceError
from mllm_edge.export.checkpoint.files import local_path
from mllm_edge.export.workspace import check_out, check_space

__all__ = ["check_checkpoint", "check_export", "check_quantize", "check_source", "is_bundle"]

_CONFIG = "config.json"


def is_bundle(folder: Path) -> bool:
    """Whether a directory is a bundle, and no checkpoint beside whatever else is called manifest.json."""
    return (folder / MANIFEST).is_file() and not (folder / _CONFIG).is_file()


def check_checkpoint(model: str) -> None:
    """Raise SourceError for what cannot be a checkpoint: a bundle, a file, a path that does not exist."""
    folder = local_path(model)
    if is_bundle(folder):
        name = shlex.quote(model)
        raise SourceError(
            f"{model} is a bundle, exported already",
            f'mllm-edge run {name} "What is in the picture?" --image FILE; or, if it is a float one, '
            f"mllm-edge quantize {name} OUT --data DIR",
        )
    _check_exists(model)
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        raise SourceError(f"{folder}: no {_CONFIG} here", "name a transformers checkpoint directory or a hub id")


def check_source(source: str) -> None:
    """Raise SourceError for what can be neither a bundle nor a checkpoint."""
    folder = local_path(source)
    _check_exists(source)
    if folder.is_dir() and not (folder / _CONFIG).is_file() and not (folder / MANIFEST).is_file():
        raise SourceError(
            f"{source} is no bundle ({MANIFEST}) and no checkpoint ({_CONFIG})",
            "name a bundle exported with --recipe fp16, a checkpoint directory or a hub id",
        )


def check_export(model: str, out: str, force: bool, dry_run: bool) -> None:
    """Raise what an export would raise about its arguments."""
    check_checkpoint(model)
    if not dry_run:
        check_out(Path(out), force)


def check_quantize(source: str, out: str, data: str | None, force: bool) -> None:
    """Raise what a quantization would raise about its arguments. Without `data` the built-in text calibrates."""
    from mllm_edge.calibration.data import load_samples

    check_source(source)
    check_out(Path(out), force)
    if is_bundle(local_path(source)):  # what is quantized is no larger
        check_space(Path(out), sum(p.stat().st_size for p in local_path(source).iterdir() if p.is_file()))
    if data is not None:
        load_samples(data, missing_images=True)


def _check_exists(source: str) -> None:
    path = local_path(source)
    if path.is_dir():
        return
    if path.is_file():
        raise SourceError(f"{source} is a file", f"name the directory it lies in: {path.parent}")
    # What is left may be a hub id.
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise SourceError(f"{source}: no such directory", "give a directory, or a hub id like owner/name")
