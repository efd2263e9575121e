"""A bundle exists whole or not at all: it is built in a hidden sibling directory and moved into place at the end."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.bundle import MANIFEST
from mllm_edge.errors import ExportError, WriteError
from mllm_edge.files import existing_parent, room, sync, sync_folder, write_error
from mllm_edge.lock import locked

__all__ = ["check_out", "check_space", "full_disk", "reserved", "workspace"]

_RESERVE = 64 << 20  # bytes left free beside the bundle
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def check_out(out: Path, force: bool) -> None:
    """Raise ExportError when `out` is in the way, or cannot come to be: it exists without `force`, holds something that
    is no bundle, or lies where nothing can be written."""
    if not out.exists():
        parent = existing_parent(out)
        if not parent.is_dir():
            raise ExportError(f"{out}: {parent} is a file", "choose another directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ExportError(f"{out}: {parent} cannot be written to", "choose another directory")
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file", "choose another directory")
    if not force:
        raise ExportError(f"{out} exists already", "choose another directory, or replace it with --force")
    if any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ExportError(
            f"{out} is a directory that is not a bundle; --force replaces bundles only", "choose another directory"
        )
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ExportError(f"{out}: {out.absolute().parent} cannot be written to", "choose another directory")


def check_space(out: Path, nbytes: int, proof: int = 0) -> None:
    """Raise ExportError when the file system of `out` has no room for `nbytes`, and for what its comparison takes."""
    parent, free = existing_parent(out), room(out)
    if free < nbytes + proof + _RESERVE:
        compared = f", its comparison with the source {proof / 1e6:.0f} MB more," if proof else ""
        raise ExportError(
            f"{parent}: {free / 1e6:.0f} MB free, the bundle needs {nbytes / 1e6:.0f} MB{compared} and some reserve",
            "free some space, choose another disk, or a smaller recipe (--recipe int4)",
        )


@contextlib.contextmanager
def full_disk(place: Path, nbytes: int = 0) -> Iterator[None]:
    """Make an ExportError of a file that cannot be written at or below `place`, where `nbytes` are wanted in all."""
    try:
        yield
    except OSError as e:
        told = e if isinstance(e, WriteError) else write_error(e.filename or place, e, nbytes or None)
        raise ExportError(told.message, told.fix) from e


@contextlib.contextmanager
def reserved(out: Path, force: bool) -> Iterator[Path]:
    """Keep others from `out`, which is checked, and put right what a killed export left there. Yields the directory
    that it names: where it is a link, what that leads to. The folders above it come to be now, and vanish where
    `out` does not.

    Raises LockedError that says who works there; ExportError as `check_out`.
    """
    check_out(out, force)
    place = Path(os.path.realpath(out))
    created = [p for p in place.parents if not p.exists()]
    try:
        with full_disk(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place) as alone:
            _remove_abandoned(place, alone)
            check_out(out, force)
            yield place
    finally:
        if not place.exists():
            _remove_empty(created)


@contextlib.contextmanager
def workspace(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """A directory to build in: when the body succeeds it becomes `out` (replacing an older one), else it vanishes.
    `nbytes` is about what will be in it; `out` must be `reserved`."""
    folder = out.parent / f".{out.name}.export-{os.getpid()}"
    try:
        with full_disk(folder, nbytes):
            folder.mkdir()
            yield folder
            _keep(folder)
            _swap(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the directories made on the way to a bundle that did not come to be, innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _keep(folder: Path) -> None:
    """Bring everything onto the disk, so that a power loss finds no bundle with empty files."""
    sync(path for path in folder.rglob("*") if path.is_file())


def _swap(folder: Path, out: Path) -> None:
    """Move `folder` to `out`. An older `out` changes places with it in one step, where the system can do that; else an
    interruption at any point leaves the older one, in its place or set aside for `_remove_abandoned`."""
    if out.exists() and _exchange(folder, out):
        sync_folder(out.parent)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(out.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change places in one step; False where the system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _remove_abandoned(out: Path, alone: bool) -> None:
    """Clear what killed exports to the same place left behind, and bring back a bundle that one had set aside. Who is
    `alone` here knows that nobody works there; otherwise processes that live are left alone."""
    for path in _abandoned(out, "old", alone):
        if out.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(out)
    for path in _abandoned(out, "export", alone):
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(out: Path, kind: str, alone: bool) -> Iterator[Path]:
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*")):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and (alone or not _alive(int(pid))):
            yield path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
