"""The decoder's memory: buffers for keys and values, allocated once, addressed by length."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backend import Backend, Buffer, Session
from mllm_edge.spec import CacheSpec

__all__ = ["KVCache", "Snapshot"]

KVMode = Literal["in_place", "append"]


@dataclass(frozen=True)
class Snapshot:
    """The cache's contents up to `length`; restores into any cache of the same model and mode."""

    length: int
    rows: tuple[np.ndarray, ...]


class KVCache:
    """Keys and values of all layers, float32, allocated once for `capacity` positions.

    `in_place`: past and present are one buffer [batch, heads, capacity, head_dim], which the graph updates. `append`:
    the graph reads a prefix of a buffer [1, capacity, heads, head_dim] and its new rows land behind that prefix. In
    neither is a cache copied. `length` counts the positions that hold tokens; what lies behind is never read, so
    truncating is free.
    """

    def __init__(self, spec: CacheSpec, backend: Backend, capacity: int, mode: KVMode = "in_place", batch: int = 1):
        if mode == "append" and batch != 1:
            raise ValueError(f"an append cache holds one sequence, not {batch}")
        self.capacity, self.length, self.mode = capacity, 0, mode
        in_place = mode == "in_place"
        self._axis = 2 if in_place else 1
        shape = (batch, spec.heads, capacity, spec.head_dim) if in_place else (1, capacity, spec.heads, spec.head_dim)
        self._buffers = {
            f"{layer}.{part}": backend.allocate(shape, "float32")
            for layer in range(spec.layers)
            for part in ("key", "value")
        }
        self._bound: Session | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def buffer(self, layer: int, part: Literal["key", "value"]) -> Buffer:
        """The memory of one layer, for tests and inspection."""
        return self._buffers[f"{layer}.{part}"]

    def advance(self, tokens: int, session: Session) -> None:
        """Make room for `tokens` new positions and bind them to the session's cache inputs and outputs.

        Raises ContextError, before anything is changed, when they do not fit.
        """
        if self.length + tokens > self.capacity:
            raise ContextError(
                f"{self.length} + {tokens} tokens exceed the cache's capacity of {self.capacity}",
                "allocate a larger cache or shorten the prompt",
            )
        if self.mode == "append":
            self._bind(session, (0, self.length), (self.length, self.length + tokens))
        elif self._bound is not session:
            self._bind(session, (0, self.capacity), (0, self.capacity))
        self._bound = session
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; raises ValueError when `length` lies beyond the end."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of length {self.length} to {length}")
        self.length = length

    def snapshot(self) -> Snapshot:
        """Copy what the cache holds."""
        return Snapshot(self.length, tuple(b.read(self._axis, self.length) for b in self._buffers.values()))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; raises ContextError when it is longer than the capacity."""
        if snapshot.length > self.capacity:
            raise ContextError(f"a snapshot of {snapshot.length} tokens exceeds the capacity of {self.capacity}")
        for buffer, rows in zip(self._buffers.values(), snapshot.rows, strict=True):
            buffer.write(self._axis, rows)
        self.length = snapshot.length

    def _bind(self, session: Session, past: tuple[int, int], present: tuple[int, int]) -> None:
        whole = past == present
        parts = {
            name: (b, b) if whole else (b.part(self._axis, *past), b.part(self._axis, *present))
            for name, b in self._buffers.items()
        }
        session.bind(
            {f"past_key_values.{name}": buffer for name, (buffer, _) in parts.items()},
            {f"present.{name}": buffer for name, (_, buffer) in parts.items()},
        )
