"""One process at a time works on a directory."""

import contextlib
import errno
import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.errors import LockedError

__all__ = ["locked"]

# On Windows a locked byte cannot be read by others; this one lies behind all that is written.
_WINDOWS_BYTE = 1 << 20
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a directory that exists or is going to, a hidden file beside it, by whatever name it is called.

    The system gives the lock back when the process ends, however it ends. Yields False where there are no locks: on a
    file system without them, or where nothing can be written beside the directory. Raises LockedError that says who
    holds it.
    """
    place = Path(os.path.realpath(folder))
    path = place.with_name(f".{place.name}.lock")
    handle = _take(path, folder)
    if handle is None:
        yield False
        return
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_self()).encode())
        yield True
    finally:
        if os.name != "nt":  # there a file that is open cannot be removed
            path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, folder: Path) -> int | None:
    """The lock file, open and locked; None where there are no locks."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            if e.errno in _NOT_WRITABLE:
                return None
            raise
        try:
            _lock(handle)
        except OSError as e:
            os.close(handle)
            if e.errno in _NO_LOCKS:
                return None
            raise _busy(path, folder) from None
        # Whoever held it before may have removed the file since it was opened.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


if sys.platform == "win32":

    def _lock(handle: int) -> None:
        import msvcrt

        os.lseek(handle, _WINDOWS_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)

else:

    def _lock(handle: int) -> None:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _self() -> dict[str, str | int]:
    program = Path(sys.argv[0]).name.replace("__main__.py", "mllm-edge") if sys.argv else "python"
    command = " ".join([program, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(Exception):  # a container's user may have no name
        return {**_place(), "command": command, "since": since, "user": getpass.getuser()}
    return {**_place(), "command": command, "since": since}


def _place() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _busy(path: Path, folder: Path) -> LockedError:
    who = "another process works on it"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(path.read_text(encoding="utf-8"))
        user = f" by {told['user']}" if "user" in told else ""
        who = f"`{told['command']}` works on it (process {told['pid']} on {told['host']}{user}, since {told['since']})"
    return LockedError(f"{folder}: {who}", "wait until it is done, or end it, or choose another directory")
