"""Token ids → rows of the token embeddings."""

import os
from collections.abc import Callable

import numpy as np

from mllm_edge.spec import EmbeddingSpec

__all__ = ["Embedder"]


class Embedder:
    """Rows of the token embeddings [rows, H], as float32.

    A memory-mapped table is read row by row from its file: a page touched in a mapping brings its neighbours along, and
    they count as memory of this process (65 kB for a row of 3 kB). `touch(start, stop)` is told the bytes of the file
    that are going to be read, and raises when they are damaged.
    """

    def __init__(
        self, table: np.ndarray, spec: EmbeddingSpec, touch: Callable[[int, int], None] = lambda start, stop: None
    ):
        self._table, self._scale, self._touch = table, np.float32(spec.scale), touch
        mapped = isinstance(table, np.memmap) and table.filename is not None and hasattr(os, "pread")
        self._file = open(table.filename, "rb") if mapped else None  # type: ignore[attr-defined]  # noqa: SIM115

    def __call__(self, token_ids: np.ndarray) -> np.ndarray:
        """Embeddings [S, H] float32 of ids [S]."""
        if isinstance(self._table, np.memmap):
            self._check(token_ids)
        rows = (self._table[token_ids] if self._file is None else self._read(token_ids)).astype(np.float32)
        return rows if self._scale == 1 else rows * self._scale

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards."""
        if self._file is not None:
            self._file.close()

    def _check(self, token_ids: np.ndarray) -> None:
        size, begin = self._table.strides[0], self._table.offset  # type: ignore[attr-defined]
        for i in token_ids.tolist():
            place = begin + (i % len(self._table)) * size
            self._touch(place, place + size)

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        assert self._file is not None
        table, size = self._table, self._table.strides[0]
        data = bytearray()
        for i in token_ids.tolist():
            if not -len(table) <= i < len(table):
                raise IndexError(f"token {i} of {len(table)}")
            place = table.offset + (i % len(table)) * size  # type: ignore[attr-defined]
            data += os.pread(self._file.fileno(), size, place)
        return np.frombuffer(data, table.dtype).reshape(len(token_ids), table.shape[1])
