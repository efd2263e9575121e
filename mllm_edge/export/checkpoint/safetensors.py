"""Memory-mapped safetensors: tensors are read one at a time, and what was read is kept in a ledger.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://huggingface.co/docs/safetensors). The header is checked against the file's size before anything is read, so a
truncated download is named as such.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mllm_edge.errors import WeightsError
from mllm_edge.export.checkpoint.casts import fill_float32
from mllm_edge.export.checkpoint.files import LFS_POINTER
from mllm_edge.export.checkpoint.weights import weight_files

__all__ = ["Change", "Weights", "open_files", "open_weights", "stored_types"]

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000
_PIECE = 1 << 20  # elements: what is read stays in the processor's cache until it is converted
Change = Callable[[np.ndarray, int], None]


@dataclass(frozen=True)
class _Entry:
    name: str  # in the file
    file: Path
    dtype: Any
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


@dataclass(frozen=True)
class _Derived:
    source: str
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]


class Weights:
    """The tensors of a checkpoint by name. Every read is recorded, so that `unused()` can name what nobody consumed."""

    def __init__(self, entries: Mapping[str, _Entry]):
        self._entries = dict(entries)
        self._derived: dict[str, _Derived] = {}
        self._behind: dict[str, str] = {}
        self._changes: dict[str, list[Change]] = {}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def derive(self, name: str, source: str, shape: tuple[int, ...], cut: Callable[[np.ndarray], np.ndarray]) -> None:
        """Give a part of the tensor `source` a name of its own, as if the checkpoint stored it: fused weights.

        `cut` makes the part, of `shape`, from the mapped source; it should slice and reshape, not compute.
        """
        self._derived[name] = _Derived(source, shape, cut)

    def extend(self, name: str, behind: str) -> None:
        """Let the rows of the tensor `behind` stand behind those of `name`, as if the checkpoint stored one tensor.
        Raises WeightsError for one that is missing, or rows of another size."""
        first, second = self._entry(name), self._entry(behind)
        if len(second.shape) != len(first.shape) or second.shape[1:] != first.shape[1:]:
            raise WeightsError(
                f"{second.file}: tensor {second.name} has shape {list(second.shape)}, and stands behind {first.name} "
                f"{list(first.shape)}",
                "download the checkpoint again",
            )
        self._behind[name] = behind

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """The tensors that are among `names` (name → the new one), unread and unchanged; raises WeightsError for two
        that get the same name."""
        entries: dict[str, _Entry] = {}
        for name, new in names.items():
            if new in entries:
                raise WeightsError(f"{self._entry(name).file}: two tensors are {new}", "download the checkpoint again")
            entries[new] = self._entry(name)
        return Weights(entries)

    def under(self, rename: Callable[[str], str]) -> "Weights":
        """All tensors under other names, with what alters them; errors go on naming them as their files do. Raises
        WeightsError for two that get the same name."""
        weights = Weights({})
        for name, entry in self._entries.items():
            new = rename(name)
            if new in weights:
                both = f"{weights._entries[new].name} and {entry.name}"
                raise WeightsError(f"{entry.file}: {both} are both {new}", "download the checkpoint again")
            weights._entries[new] = entry
            if name in self._changes:
                weights._changes[new] = list(self._changes[name])
        return weights

    def stored_name(self, name: str) -> str:
        """What a tensor is called in its file; `name` itself, where there is none."""
        entry = self._entries.get(name)
        return name if entry is None else entry.name

    def alter(self, name: str, change: Change) -> None:
        """Let `change(values, start)` correct rows [n, ...] from row `start` on, in place and in float32, whenever they
        are read. Several changes of a tensor follow one another."""
        self._entry(name)
        self._changes.setdefault(name, []).append(change)

    @property
    def altered(self) -> tuple[str, ...]:
        """Names of the tensors that `alter` has changed."""
        return tuple(self._changes)

    @property
    def parameters(self) -> int:
        """Number of stored elements, tied weights counted once."""
        return sum(int(np.prod(e.shape, dtype=np.int64)) for e in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises WeightsError when the checkpoint has no such tensor."""
        if name in self._derived:
            return self._derived[name].shape
        first, *others = (self._entry(stored).shape for stored in self._pieces(name))
        return (first[0] + sum(rows for rows, *_ in others), *first[1:]) if others else first

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype (bfloat16 through ml_dtypes)."""
        return np.dtype(self._entry(name).dtype)

    def use(self, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        """Claim a tensor of the expected shape; the returned function reads it as float32 when called.

        Raises WeightsError when it is missing or has another shape, at once and not when it is read.
        """
        derived = self._derived.get(name)
        entry = self._entry(derived.source if derived else name)
        found = derived.shape if derived else self.shape(name)
        if found != shape:
            raise WeightsError(
                f"{entry.file}: tensor {entry.name} has shape {list(found)}, but config.json asks for {list(shape)}",
                "use the config.json that belongs to these weights",
            )
        self._used.update([derived.source] if derived else self._pieces(name))
        return lambda: self.read(name)

    def with_row(
        self, table: str, shape: tuple[int, ...], row: str, row_shape: tuple[int, ...]
    ) -> Callable[[], np.ndarray]:
        """As `use`, of `table`, to whose first row another tensor is added: a class token that is the same for all
        images joins its own position. The result is [rows, size]."""
        read, token = self.use(table, shape), self.use(row, row_shape)

        def joined() -> np.ndarray:
            values = read().reshape(-1, shape[-1])
            values[0] += token().reshape(-1)
            return values

        return joined

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor in float32."""
        if name in self._derived:
            return self.view(name).astype(np.float32, order="C")
        if name in self._behind:
            return np.concatenate([self._read(stored) for stored in self._pieces(name)])
        return self._read(name)

    def _read(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        self._used.add(name)
        values = np.empty(entry.shape, np.float32)
        flat = values.reshape(-1)
        _announce(entry)
        for start in range(0, len(flat), _PIECE):
            _read(entry, start, flat[start : start + _PIECE])
        self._correct(name, values, 0)
        return values

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A copy of some rows (along the first axis) of a tensor, in float32."""
        if name not in self._behind:
            return self._rows(name, start, stop)
        end, behind = self._entry(name).shape[0], self._behind[name]
        parts = [self._rows(name, start, min(stop, end))] if start < end else []
        return np.concatenate([*parts, *([self._rows(behind, max(start - end, 0), stop - end)] if stop > end else [])])

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        entry = self._entry(name)
        self._used.add(name)
        values = np.empty((stop - start, *entry.shape[1:]), np.float32)
        _read(entry, start * int(np.prod(entry.shape[1:])), values.reshape(-1))
        self._correct(name, values, start)
        return values

    def view(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype, backed by the mapped file; an altered one is a copy in float32."""
        if name in self._derived:
            derived = self._derived[name]
            return derived.cut(self.view(derived.source))
        if name in self._changes or name in self._behind:
            return self.read(name)
        entry = self._entry(name)
        self._used.add(name)
        return np.memmap(entry.file, dtype=entry.dtype, mode="r", offset=entry.start, shape=entry.shape)

    def ignore(self, names: Iterable[str]) -> None:
        """Mark tensors as known and rightly unused (inverse frequencies saved by old versions, say)."""
        self._used.update(names)

    def unused(self) -> list[str]:
        """Names that nobody claimed or read, in checkpoint order."""
        return [n for n in self._entries if n not in self._used]

    def _pieces(self, name: str) -> tuple[str, ...]:
        """The stored tensors that are one."""
        return (name, self._behind[name]) if name in self._behind else (name,)

    def _likely_name(self, name: str) -> str:
        """What the files would call a tensor that is not there: told from one of another layer."""
        pattern, numbers = re.sub(r"\d+", r"\\d+", re.escape(name)), re.findall(r"\d+", name)
        for other, entry in self._entries.items():
            pieces = re.split(r"\d+", entry.name)
            if numbers and len(pieces) == len(numbers) + 1 and re.fullmatch(pattern, other):
                return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))
        return name

    def _correct(self, name: str, values: np.ndarray, start: int) -> None:
        for change in self._changes.get(name, ()):
            change(values, start)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            folder = next(iter(self._entries.values())).file.parent if self._entries else Path(".")
            raise WeightsError(
                f"{folder}: the checkpoint has no tensor {self._likely_name(name)}",
                "the download is incomplete, or the weights belong to another architecture than config.json says",
            )
        return self._entries[name]


def _announce(entry: _Entry) -> None:
    """Ask the system to read the whole tensor ahead: pieces alone would be waited for one by one."""
    if hasattr(os, "posix_fadvise"):
        with entry.file.open("rb") as f:
            nbytes = int(np.prod(entry.shape)) * entry.dtype.itemsize
            os.posix_fadvise(f.fileno(), entry.start, nbytes, os.POSIX_FADV_WILLNEED)


def _read(entry: _Entry, first: int, values: np.ndarray) -> None:
    """Fill `values` [n] float32 with the elements from `first` on. Read, not mapped: mapped pages count as the
    process's own memory, and touching them one by one takes longer."""
    raw = np.empty(len(values), entry.dtype)
    with entry.file.open("rb", buffering=0) as f:
        f.seek(entry.start + first * entry.dtype.itemsize)
        buffer = raw.view(np.uint8).data
        while buffer:
            count = f.readinto(buffer)
            if not count:
                raise WeightsError(f"{entry.file}: the file became shorter while it was read", "download it again")
            buffer = buffer[count:]
    fill_float32(values, raw)


def open_weights(folder: Path) -> Weights:
    """Open the weights of a checkpoint; `weight_files` says which files, and raises WeightsError where there are none.

    Raises WeightsError for a truncated file or a broken header, too.
    """
    return open_files(weight_files(folder))


def stored_types(files: Iterable[Path]) -> dict[str, str]:
    """Tensor → its dtype in safetensors' words, whether it can be read here or not; errors as of `open_files`."""
    return {name: str(info["dtype"]) for file in files for name, info in _read_header(file)[1].items()}


def open_files(files: Iterable[Path]) -> Weights:
    """The tensors of some safetensors files together; raises WeightsError for a truncated file or a broken header."""
    entries: dict[str, _Entry] = {}
    for file in files:
        base, header = _read_header(file)
        size = file.stat().st_size
        entries.update({name: _entry(file, name, info, base, size) for name, info in header.items()})
    return Weights(entries)


def _read_header(file: Path) -> tuple[int, dict[str, Mapping[str, Any]]]:
    """Where the data begins, and what the header says of each tensor."""
    size = file.stat().st_size
    damaged = "the file is damaged or incomplete: download it again"
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length == 0 or length > min(_MAX_HEADER, size - 8):
            if LFS_POINTER.startswith(prefix) and prefix:
                raise WeightsError(f"{file}: a pointer of git-lfs, not the weights", f"git -C {file.parent} lfs pull")
            raise WeightsError(f"{file}: not a safetensors file, or cut off inside its header", damaged)
        try:
            header = json.loads(f.read(length))
            return 8 + length, {n: _checked(v) for n, v in header.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise WeightsError(f"{file}: the safetensors header is broken ({e})", damaged) from None


def _checked(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a header says of a tensor, in the right types; raises ValueError, KeyError or TypeError."""
    begin, end = (int(n) for n in info["data_offsets"])
    shape = tuple(int(n) for n in info["shape"])
    if not 0 <= begin <= end or any(n < 0 for n in shape):
        raise ValueError(f"data_offsets {[begin, end]}, shape {list(shape)}")
    return {"dtype": str(info["dtype"]), "shape": shape, "data_offsets": (begin, end)}


def _entry(file: Path, name: str, info: Mapping[str, Any], base: int, size: int) -> _Entry:
    if info["dtype"] not in _DTYPES:
        raise WeightsError(
            f"{file}: tensor {name} has dtype {info['dtype']}",
            f"save the checkpoint in one of {', '.join(_DTYPES)}; pre-quantized checkpoints are not read",
        )
    dtype = np.dtype(_DTYPES[info["dtype"]])
    shape = info["shape"]
    begin, end = info["data_offsets"]
    if base + end > size:
        raise WeightsError(
            f"{file}: truncated: {size} bytes on disk, tensor {name} ends at byte {base + end}",
            "download the file again",
        )
    if end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise WeightsError(f"{file}: tensor {name}: its size does not match its shape", "download the file again")
    return _Entry(name, file, dtype, shape, base + begin)
