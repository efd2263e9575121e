"""A bundle exists whole or not at all: it is built in a hidden sibling directory and moved into place at the end."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.bundle import MANIFEST
from mllm_edge.errors import ExportError

__all__ = ["check_out", "check_space", "workspace"]

_RESERVE = 64 << 20  # bytes left free beside the bundle


def check_out(out: Path, force: bool) -> None:
    """Raise ExportError when `out` is in the way: it exists without `force`, or holds something that is no bundle."""
    if not out.exists():
        return
    if not force:
        raise ExportError(f"{out} exists already", "choose another directory, or replace it with --force")
    if not out.is_dir():
        raise ExportError(f"{out} is a file", "choose another directory")
    if any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} is a directory that is not a bundle; --force replaces bundles only", "choose another directory"
        )


def check_space(out: Path, nbytes: int) -> None:
    """Raise ExportError when the file system of `out` has no room for `nbytes`."""
    parent = _existing_parent(out)
    free = shutil.disk_usage(parent).free
    if free < nbytes + _RESERVE:
        raise ExportError(
            f"{parent}: {free / 1e6:.0f} MB free, the bundle needs {nbytes / 1e6:.0f} MB and some reserve",
            "free some space, choose another disk, or a smaller recipe (--recipe int4)",
        )


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A directory to build in: when the body succeeds it becomes `out` (replacing an older one), else it vanishes."""
    created = [p for p in out.absolute().parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    folder = out.parent / f".{out.name}.export-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        _swap(folder, out)
    except OSError as e:
        raise ExportError(f"{e.filename or folder}: {e.strerror or e}", "free some space or choose another disk") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not out.exists():
            _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the directories made on the way to a bundle that did not come to be, innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _swap(folder: Path, out: Path) -> None:
    """Move `folder` to `out`. An interruption at any point leaves the older `out` or the new one in place."""
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Clear what killed exports to the same place left behind, and bring back a bundle that one had set aside."""
    for path in _abandoned(out, "export"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _abandoned(out, "old"):
        if out.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(out)


def _abandoned(out: Path, kind: str) -> Iterator[Path]:
    for path in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            yield path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
