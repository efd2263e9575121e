"""The decoder's memory: buffers for each kind of state, allocated once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.base import Backend, Buffer, Session, Sliding
from mllm_edge.spec import StateKind, StateSpec, rewindable, state_input, state_names, state_output

__all__ = ["Cache", "CacheMode", "Snapshot"]

CacheMode = Literal["in_place", "append"]
_GROWING: StateKind = "growing"
_RECURRENT: StateKind = "recurrent"


@dataclass(frozen=True)
class Snapshot:
    """The cache's contents: growing state up to each sequence's length, recurrent state whole. Restores into any cache
    of the same model, mode and batch."""

    lengths: tuple[int, ...]
    rows: tuple[np.ndarray, ...]
    recurrent: tuple[np.ndarray, ...] = ()

    @property
    def length(self) -> int:
        """That of the longest sequence."""
        return max(self.lengths)


class Cache:
    """What a decoder remembers of `batch` sequences of up to `capacity` tokens, allocated once unless it has to grow.

    Growing state, `in_place`: past and present are one buffer [batch, heads, capacity, head_dim], which the graph
    updates. `append`: the graph reads a prefix of a buffer [batch, capacity, heads, head_dim], one sequence at a time,
    and its new rows land behind that prefix. In neither is anything copied. `lengths` [batch] count the positions that
    hold tokens; what lies behind is never read, so truncating is free.

    Recurrent state: two buffers [batch, width, channels], of which a run reads one and writes the other. They change
    roles when the run has succeeded (`turn`), so one that failed has changed nothing. `rewindable`: there is none of
    this, and any number of tokens can be forgotten.
    """

    def __init__(
        self,
        state: Sequence[StateSpec],
        backend: Backend,
        capacity: int,
        mode: CacheMode = "in_place",
        batch: int = 1,
        dtypes: Mapping[str, str] | None = None,
    ):
        """`dtypes`: those of the graph's inputs, by name; float32 where nothing is said."""
        self.capacity, self.mode, self.batch = capacity, mode, batch
        self._backend, self._shapes = backend, dict[str, tuple[tuple[int, int], str]]()
        self.lengths = np.zeros(batch, np.int64)
        self.rewindable = rewindable(state)
        self._axis = 2 if mode == "in_place" else 1
        self._buffers: dict[str, Buffer] = {}
        self._pairs: dict[str, tuple[Buffer, Buffer]] = {}
        self._zeros: dict[str, np.ndarray] = {}
        for spec in state:
            for name, tensor in zip(spec.names, spec.inputs, strict=True):
                dtype = (dtypes or {}).get(tensor, "float32")
                if spec.kind == _GROWING:
                    heads, size = spec.shape
                    self._shapes[name] = (heads, size), dtype
                    self._buffers[name] = self._allocated(name)
                else:
                    shape = (batch, *spec.shape)
                    self._pairs[name] = (backend.allocate(shape, dtype), backend.allocate(shape, dtype))
                    self._zeros[name] = np.zeros((1, *spec.shape), dtype)
        self._turns = np.zeros(batch, np.int64)  # which buffer of a pair holds a sequence's state
        self._bound: tuple[Session, int | None] | None = None

    @property
    def length(self) -> int:
        """Positions of the longest sequence (of the only one, mostly)."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        pairs = (buffer for pair in self._pairs.values() for buffer in pair)
        return sum(buffer.nbytes for buffer in (*self._buffers.values(), *pairs))

    def buffer(self, layer: int, part: Literal["key", "value"]) -> Buffer:
        """The memory of one layer's keys or values, for tests and inspection."""
        return self._buffers[dict(zip(("key", "value"), state_names(_GROWING, layer), strict=True))[part]]

    def advance(self, tokens: int | Sequence[int], session: Session, row: int | None = None) -> None:
        """Make room for new positions and bind them to the session's state inputs and outputs; `turn` ends the run.

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
            past, end = int(self.lengths[row or 0]), int(lengths[0])
            bound = self._bound == (session, row)
            if not (bound and isinstance(session, Sliding) and session.slide(past, end)):
                self._bind_prefix(session, row or 0, past, end)
        elif self._bound != (session, row):
            self._bind_whole(session, row)
        if self._pairs:
            self._bind_pairs(session, row)
        self._bound = (session, row)
        self.lengths[chosen] = lengths

    def grow(self, capacity: int, session: Session) -> None:
        """Make room for up to `capacity` tokens, more than there is: one buffer after the other is copied and bound
        anew, so that not all of them are there twice. What lies behind the lengths is lost."""
        self.capacity = capacity
        for name in self._buffers:
            larger = self._allocated(name)
            larger.write(self._axis, self._buffers[name].read(self._axis, self.length))
            self._buffers[name] = larger
            if self.mode == "in_place":
                self._bind(session, {name: larger}, {name: larger})
        self._bound = None

    def _allocated(self, name: str) -> Buffer:
        (heads, size), dtype = self._shapes[name]
        places = (heads, self.capacity) if self.mode == "in_place" else (self.capacity, heads)
        return self._backend.allocate((self.batch, *places, size), dtype)

    def turn(self, row: int | None = None) -> None:
        """A run behind `advance` has succeeded: what it wrote is the recurrent state now."""
        self._turns[slice(None) if row is None else row] ^= 1

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget all positions from `length` on (one for all sequences, or one for each); raises ValueError when it
        lies beyond the end, or within a sequence that has recurrent state."""
        wanted = np.broadcast_to(np.asarray(length), self.lengths.shape)
        if (wanted < 0).any() or (wanted > self.lengths).any():
            raise ValueError(f"cannot truncate a cache of length {_plain(self.lengths)} to {_plain(wanted)}")
        if not self.rewindable and ((wanted > 0) & (wanted < self.lengths)).any():
            raise ValueError(
                f"cannot truncate a cache of length {_plain(self.lengths)} to {_plain(wanted)}: the model's recurrent "
                "state has no way back, only to the start; take a snapshot before"
            )
        self.lengths[:] = wanted
        if self._pairs:
            self._clear(np.flatnonzero(wanted == 0))

    def extend(self, tokens: int) -> None:
        """Count `tokens` positions behind the end of each sequence again, which `truncate` left out and nothing has
        overwritten since; raises ValueError when they lie beyond the capacity, or there is recurrent state."""
        if not self.rewindable and tokens:
            raise ValueError("cannot extend a cache with recurrent state: what was forgotten is gone")
        if tokens < 0 or self.length + tokens > self.capacity:
            raise ValueError(f"cannot extend a cache of length {_plain(self.lengths)} by {tokens} of {self.capacity}")
        self.lengths += tokens

    def snapshot(self) -> Snapshot:
        """Copy what the cache holds."""
        self._align()
        rows = tuple(b.read(self._axis, self.length) for b in self._buffers.values())
        recurrent = tuple(first.read(0, self.batch) for first, _ in self._pairs.values())
        return Snapshot(tuple(self.lengths.tolist()), rows, recurrent)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; raises ContextError when it is longer than the capacity, ValueError when it holds
        another number of sequences."""
        if len(snapshot.lengths) != self.batch:
            raise ValueError(f"a snapshot of {len(snapshot.lengths)} sequences does not fit a cache of {self.batch}")
        if snapshot.length > self.capacity:
            raise ContextError(f"a snapshot of {snapshot.length} tokens exceeds the capacity of {self.capacity}")
        for buffer, rows in zip(self._buffers.values(), snapshot.rows, strict=True):
            buffer.write(self._axis, rows)
        for (first, _), values in zip(self._pairs.values(), snapshot.recurrent, strict=True):
            first.write(0, values)
        self._turns[:] = 0
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
            {state_input(_GROWING, name): buffer for name, buffer in past.items()},
            {state_output(_GROWING, name): buffer for name, buffer in present.items()},
        )

    def _bind_pairs(self, session: Session, row: int | None) -> None:
        """One buffer of each pair is read, the other written."""
        if row is None and (self._turns != self._turns[0]).any():
            self._align()
        read = int(self._turns[row or 0])
        past, present = (
            {n: p[i] if row is None else p[i].part(0, row, row + 1) for n, p in self._pairs.items()}
            for i in (read, 1 - read)
        )
        session.bind(
            {state_input(_RECURRENT, name): buffer for name, buffer in past.items()},
            {state_output(_RECURRENT, name): buffer for name, buffer in present.items()},
        )

    def _align(self) -> None:
        """All sequences' state into the first buffer of each pair."""
        for first, second in self._pairs.values():
            for row in np.flatnonzero(self._turns).tolist():
                first.part(0, row, row + 1).write(0, second.part(0, row, row + 1).read(0, 1))
        self._turns[:] = 0

    def _clear(self, rows: np.ndarray) -> None:
        """Zeros, as before the first token."""
        for name, pair in self._pairs.items():
            for row in rows.tolist():
                pair[self._turns[row]].part(0, row, row + 1).write(0, self._zeros[name])


def _plain(lengths: np.ndarray) -> int | list[int]:
    return int(lengths[0]) if len(lengths) == 1 else lengths.tolist()
