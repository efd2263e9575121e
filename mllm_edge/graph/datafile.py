"""External data of one graph: tensors are computed, appended and forgotten, one at a time."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from mllm_edge.checksums import FileHasher
from mllm_edge.spec import FileEntry

__all__ = ["DataFile", "DataSink", "DryFile"]

# ONNX Runtime maps external data whose offset is a multiple of the page (and on Windows, allocation) granularity.
_ALIGNMENT = 4096
# Below this, a tensor sits inside the .onnx file itself.
_INLINE_BYTES = 1024


class DataSink(Protocol):
    """Where a graph's weights go; `nbytes` is what they take on disk."""

    nbytes: int

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], np.ndarray]
    ) -> ir.TensorProtocol: ...


class DataFile:
    """Appends tensors to `path`; use as a context manager.

    Tensors are hashed and written by a thread while the next one is computed; at most one waits. An error of writing
    is raised by a later `add`, or at the end. `on_bytes(n)` is called after each tensor with the number of bytes, for a
    progress bar. `entry` is what the manifest says about the file, once it is closed.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None] = lambda n: None):
        self.path, self._on_bytes = path, on_bytes
        self.nbytes = 0
        self.entry = FileEntry(0, "")
        self._file, self._hash = path.open("wb"), FileHasher(path.name)
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        self._file.close()
        self.entry = self._hash.entry()
        if self.nbytes == 0:
            self.path.unlink()
        if kind is None:
            self._wait()

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], np.ndarray]
    ) -> ir.TensorProtocol:
        """Write the array that `compute` returns (of `shape`, already in `dtype`) and return a reference to it."""
        array = np.asarray(compute(), order="C")
        assert array.shape == shape, f"{name}: {array.shape} instead of {shape}"
        assert array.dtype == dtype.numpy(), f"{name}: {array.dtype} instead of {dtype}"
        if array.nbytes < _INLINE_BYTES:
            self._on_bytes(array.nbytes)
            return ir.tensor(array, dtype=dtype, name=name)
        offset = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
        raw = _pack_nibbles(array) if dtype == ir.DataType.INT4 else array
        self._wait()
        self._pending = self._writer.submit(self._append, offset - self.nbytes, raw)
        self.nbytes = offset + raw.nbytes
        self._on_bytes(raw.nbytes)
        return ir.ExternalTensor(
            self.path.name, offset, raw.nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )

    def _append(self, padding: int, raw: np.ndarray) -> None:
        for data in (b"\0" * padding, raw.reshape(-1).view(np.uint8).data):
            self._hash.update(data)
            self._file.write(data)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def _pack_nibbles(array: np.ndarray) -> np.ndarray:
    """int4 elements in row order, two to a byte, the earlier one low (ONNX's layout of 4-bit tensors)."""
    flat = array.reshape(-1).astype(np.int8).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[0::2] | (flat[1::2] << 4)


class DryFile:
    """Counts bytes and computes nothing: for `--dry-run` and for progress totals."""

    def __init__(self) -> None:
        self.nbytes = 0

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], np.ndarray]
    ) -> ir.TensorProtocol:
        """Count the tensor; the reference returned points nowhere."""
        size = math.ceil(math.prod(shape) * dtype.itemsize)
        self.nbytes += size
        return ir.ExternalTensor("nowhere", 0, size, dtype, shape=ir.Shape(shape), name=name)
