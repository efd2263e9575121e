"""The decoder's memory: buffers for keys and values, allocated once, addressed by length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.base import Backend, Buffer, Session
from mllm_edge.spec import CacheSpec

__all__ = ["KVCache", "KVMode", "Snapshot"]

KVMode = Literal["in_place", "append"]


@dataclass(frozen=True)
class Snapshot:
    """The cache's contents up to each sequence's length; restores into any cache of the same model, mode and batch."""

    lengths: tuple[int, ...]
    rows: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        """That of the longest sequence."""
        return max(self.lengths)


class KVCache:
    """Keys and values of all layers, allocated once for `batch` sequences of up to `capacity` positions.

    `in_place`: past and present are one buffer [batch, heads, capacity, head_dim], which the graph updates. `append`:
    the graph reads a prefix of a buffer [batch, capacity, heads, head_dim], one sequence at a time, and its new rows
    land behind that prefix. In neither is a cache copied. `lengths` [batch] count the positions that hold tokens; what
    lies behind is never read, so truncating is free.
    """

    def __init__(
        self,
        spec: CacheSpec,
        backend: Backend,
        capacity: int,
        mode: KVMode = "in_place",
        batch: int = 1,
        dtype: str = "float32",
    ):
        self.capacity, self.mode, self.batch = capacity, mode, batch
        self.lengths = np.zeros(batch, np.int64)
        in_place = mode == "in_place"
        self._axis = 2 if in_place else 1
        places = (spec.heads, capacity) if in_place else (capacity, spec.heads)
        self._buffers = {
            f"{layer}.{part}": backend.allocate((batch, *places, spec.head_dim), dtype)
            for layer in range(spec.layers)
            for part in ("key", "value")
        }
        self._bound: tuple[Session, int | None] | None = None

    @property
    def length(self) -> int:
        """Positions of the longest sequence (of the only one, mostly)."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def buffer(self, layer: int, part: Literal["key", "value"]) -> Buffer:
        """The memory of one layer, for tests and inspection."""
        return self._buffers[f"{layer}.{part}"]

    def advance(self, tokens: int | Sequence[int], session: Session, row: int | None = None) -> None:
        """Make room for new positions and bind them to the session's cache inputs and outputs.

        `tokens`: how many, in each sequence or in all alike. `row`: only this sequence is advanced and bound, as a
        batch of one; an `append` cache of several sequences always wants it. Raises ContextError, before anything is
        changed, when they do not fit.
        """
        chosen = slice(None) if row is None else slice(row, row + 1)
        lengths = self.lengths[chosen] + tokens
        if lengths.max() > self.capacity:
            raise ContextError(
                f"{self.lengths[chosen].max()} + {np.max(tokens)} tokens exceed the cache's capacity of "
                f"{self.capacity}",
                "allocate a larger cache or shorten the prompt",
            )
        if self.mode == "append":
            if row is None and self.batch != 1:
                raise ValueError(f"an append cache advances one sequence at a time, not {self.batch}")
            self._bind_prefix(session, row or 0, int(self.lengths[row or 0]), int(lengths[0]))
        elif self._bound != (session, row):
            self._bind_whole(session, row)
        self._bound = (session, row)
        self.lengths[chosen] = lengths

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget all positions from `length` on (one for all sequences, or one for each); raises ValueError when it
        lies beyond the end."""
        wanted = np.broadcast_to(np.asarray(length), self.lengths.shape)
        if (wanted < 0).any() or (wanted > self.lengths).any():
            raise ValueError(f"cannot truncate a cache of length {_plain(self.lengths)} to {_plain(wanted)}")
        self.lengths[:] = wanted

    def extend(self, tokens: int) -> None:
        """Count `tokens` positions behind the end of each sequence again, which `truncate` left out and nothing has
        overwritten since; raises ValueError when they lie beyond the capacity."""
        if tokens < 0 or self.length + tokens > self.capacity:
            raise ValueError(f"cannot extend a cache of length {_plain(self.lengths)} by {tokens} of {self.capacity}")
        self.lengths += tokens

    def snapshot(self) -> Snapshot:
        """Copy what the cache holds."""
        lengths, longest = tuple(self.lengths.tolist()), self.length
        return Snapshot(lengths, tuple(b.read(self._axis, longest) for b in self._buffers.values()))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; raises ContextError when it is longer than the capacity, ValueError when it holds
        another number of sequences."""
        if len(snapshot.lengths) != self.batch:
            raise ValueError(f"a snapshot of {len(snapshot.lengths)} sequences does not fit a cache of {self.batch}")
        if snapshot.length > self.capacity:
            raise ContextError(f"a snapshot of {snapshot.length} tokens exceeds the capacity of {self.capacity}")
        for buffer, rows in zip(self._buffers.values(), snapshot.rows, strict=True):
            buffer.write(self._axis, rows)
        self.lengths[:] = snapshot.lengths

    def _bind_whole(self, session: Session, row: int | None) -> None:
        """Past and present are the same memory."""
        parts = {n: b if row is None else b.part(0, row, row + 1) for n, b in self._buffers.items()}
        self._bind(session, parts, parts)

    def _bind_prefix(self, session: Session, row: int, past: int, end: int) -> None:
        """The past is a prefix, the present the places behind it."""
        rows = {n: b.part(0, row, row + 1) if self.batch > 1 else b for n, b in self._buffers.items()}
        self._bind(
            session,
            {n: b.part(self._axis, 0, past) for n, b in rows.items()},
            {n: b.part(self._axis, past, end) for n, b in rows.items()},
        )

    @staticmethod
    def _bind(session: Session, past: dict[str, Buffer], present: dict[str, Buffer]) -> None:
        session.bind(
            {f"past_key_values.{name}": buffer for name, buffer in past.items()},
            {f"present.{name}": buffer for name, buffer in present.items()},
        )


def _plain(lengths: np.ndarray) -> int | list[int]:
    return int(lengths[0]) if len(lengths) == 1 else lengths.tolist()
