"""Checksums of files block by block: XXH3 is nearly as fast as memory, so that every load can afford it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from mllm_edge.spec import FileEntry

__all__ = ["FileHasher", "Touched", "damaged_block", "file_entry", "own_checksum", "sha256"]

_BLOCK = 1 << 20  # bytes
_ROWS_BLOCK = 1 << 16  # of arrays: a row that is wanted costs the check of its block
_DIGITS = 16  # of a block's checksum in hexadecimal


class FileHasher:
    """The entry of a file called `name`, from its bytes as they come."""

    def __init__(self, name: str):
        self._block = _ROWS_BLOCK if name.endswith(".npy") else _BLOCK
        self._sha256, self._part = hashlib.sha256(), xxhash.xxh3_64()
        self._sums: list[str] = []
        self._nbytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """More bytes of the file."""
        self._sha256.update(data)
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: self._block - self._nbytes % self._block]
            self._part.update(piece)
            self._nbytes += len(piece)
            if self._nbytes % self._block == 0:
                self._end_block()
            view = view[len(piece) :]

    def entry(self) -> FileEntry:
        """What the manifest says about the file; nothing may come after it."""
        if self._nbytes % self._block:
            self._end_block()
        return FileEntry(self._nbytes, self._sha256.hexdigest(), self._block, "".join(self._sums))

    def _end_block(self) -> None:
        self._sums.append(self._part.hexdigest())
        self._part.reset()


def file_entry(path: Path) -> FileEntry:
    """Size and checksums of a file."""
    hasher = FileHasher(path.name)
    with path.open("rb") as f:
        while chunk := f.read(_BLOCK):
            hasher.update(chunk)
    return hasher.entry()


def sha256(path: Path, progress: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a file in hexadecimal; `progress(n)` is called with bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_BLOCK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def own_checksum(text: bytes) -> str:
    """Of a file that holds its own checksum, as zeros in `text`: its bytes, in 12 digits, and its XXH3."""
    return f"{len(text):012}-{xxhash.xxh3_64_hexdigest(text)}"


def damaged_block(path: Path, entry: FileEntry) -> range | None:
    """The bytes of the first block that differs from its checksum; None when none does, or none has a checksum."""
    if not entry.xxh3:
        return None
    buffer = memoryview(bytearray(min(entry.block, entry.nbytes)))
    with path.open("rb", buffering=0) as f:
        for number, expected in enumerate(_sums(entry)):
            if _fill(f, buffer) != expected:
                return _place(entry, number)
    return None


class Touched:
    """The blocks of a file, each compared with its checksum when a part of it is read for the first time."""

    def __init__(self, path: Path, entry: FileEntry, damaged: Callable[[range], Exception]):
        self._path, self._entry, self._damaged = path, entry, damaged
        self._sums = _sums(entry)
        self._whole = np.zeros(len(self._sums), bool)

    def __call__(self, start: int, stop: int) -> None:
        """Bytes from `start` up to `stop` are going to be read; raises what `damaged` makes of the place of damage."""
        if not self._sums or stop <= start:
            return
        block = self._entry.block
        wanted = range(start // block, min((stop - 1) // block + 1, len(self._sums)))
        todo = [number for number in wanted if not self._whole[number]]
        if not todo:
            return
        buffer = memoryview(bytearray(block))
        with self._path.open("rb", buffering=0) as f:
            for number in todo:
                f.seek(number * block)
                if _fill(f, buffer) != self._sums[number]:
                    raise self._damaged(_place(self._entry, number))
                self._whole[number] = True


def _sums(entry: FileEntry) -> list[str]:
    return [entry.xxh3[i : i + _DIGITS] for i in range(0, len(entry.xxh3), _DIGITS)]


def _place(entry: FileEntry, number: int) -> range:
    return range(number * entry.block, min((number + 1) * entry.block, entry.nbytes))


def _fill(file: BinaryIO, buffer: memoryview) -> str:
    """The checksum of as many bytes as there are, up to the buffer's size."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return xxhash.xxh3_64_hexdigest(buffer[:filled])
