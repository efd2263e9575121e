"""Files that exist whole or not at all, also after a power loss, and what is said where there is no room for them."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mllm_edge.errors import WriteError

__all__ = [
    "check_places",
    "existing_parent",
    "reporting",
    "room",
    "sync",
    "sync_folder",
    "write_error",
    "write_whole",
    "writing_whole",
]

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def writing_whole(path: str | Path, nbytes: int | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `path` when the body succeeds; else what was there stays.

    `durable`: it is on the disk before it gets its name, so that a power loss leaves the old or the new one. A link is
    followed; a device or pipe is written as it is. Raises WriteError that names the path and `nbytes`, where known.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file() and not place.is_dir():
        with reporting(path, nbytes), place.open("wb", buffering=0) as f:
            yield f
        return
    with reporting(path, nbytes):
        mode = stat.S_IMODE(place.stat().st_mode) if place.is_file() else 0o666 & ~_umask()
        handle, name = tempfile.mkstemp(prefix=f".{place.name[:64]}.", suffix=".part", dir=place.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                yield f
                f.flush()
                if durable:
                    os.fsync(f.fileno())
            os.chmod(name, mode)
            os.replace(name, place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        if durable:
            sync_folder(place.parent)


def write_whole(path: str | Path, data: str | bytes, durable: bool = True) -> None:
    """Write a file as `writing_whole` does; text in UTF-8, line ends as they are."""
    content = data.encode() if isinstance(data, str) else data
    with writing_whole(path, len(content), durable) as f:
        f.write(content)


def sync(paths: Iterable[Path]) -> None:
    """Bring files, and the folders they lie in, onto the disk: before something says that they are there. Raises
    OSError where that fails, for a file that could not be written shows itself here."""
    folders = set()
    for path in paths:
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring names onto the disk, where the system has a way to."""
    with contextlib.suppress(OSError):  # Windows opens no folders; some network file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def reporting(path: str | Path, nbytes: int | None = None) -> Iterator[None]:
    """Make a WriteError of an OSError; `nbytes` are those that were going to be written."""
    try:
        yield
    except WriteError:
        raise
    except OSError as e:
        raise write_error(path, e, nbytes) from e


def write_error(path: str | Path, error: OSError, nbytes: int | None = None) -> WriteError:
    """What is said of a write that failed: where, why, and how much room there is and was wanted."""
    where = Path(path)
    # Numpy reports a full disk by the number of items only.
    if error.errno in _FULL or error.errno is None:
        wanted = "" if nbytes is None else f", {_mb(nbytes)} wanted"
        reason = error.strerror or str(error)
        return WriteError(
            f"{where}: {reason} ({_mb(room(where))} free{wanted})", "free some space there, or choose another disk"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not where.parent.is_dir():
        return WriteError(f"{where}: the folder {where.parent} does not exist", f"mkdir -p {where.parent}")
    return WriteError(f"{error.filename or where}: {error.strerror}", "choose another place, or change its permissions")


def check_places(paths: Iterable[str | Path]) -> None:
    """Raise WriteError unless each path can become a file, all of them different: to be asked before long work."""
    places: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            raise WriteError(f"{path} is a folder", "name a file in it")
        if not path.parent.is_dir():
            raise WriteError(f"{path.parent} does not exist", f"mkdir -p {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise WriteError(f"{path.parent} cannot be written to", "name a file in another folder")
        places.append(os.path.realpath(path))
        if places.count(places[-1]) > 1:
            raise WriteError(f"{places[-1]} is named twice", "give each file a name of its own")


def room(path: Path) -> int:
    """Bytes free on the file system of a path, which need not exist; 0 where that cannot be known."""
    try:
        return shutil.disk_usage(existing_parent(path)).free
    except OSError:
        return 0


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
