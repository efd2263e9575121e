"""The decoder's memory: buffers for keys and values, allocated once, addressed by length."""

from dataclasses import dataclass

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backend import Backend, Buffer
from mllm_edge.spec import CacheSpec

__all__ = ["KVCache", "Snapshot"]

_SEQUENCE_AXIS = 2


@dataclass(frozen=True)
class Snapshot:
    """The cache's contents up to `length`; restores into any cache of the same model."""

    length: int
    rows: tuple[np.ndarray, ...]


class KVCache:
    """Keys and values of all layers, in place: past and present are one buffer [batch, heads, capacity, head_dim].

    `length` counts the positions that hold tokens. What lies behind it is never read, so truncating is free.
    """

    def __init__(self, spec: CacheSpec, backend: Backend, capacity: int, batch: int = 1):
        self.capacity, self.length = capacity, 0
        self._layers = spec.layers
        shape = (batch, spec.heads, capacity, spec.head_dim)
        self._buffers = {
            f"{layer}.{part}": backend.allocate(shape, "float32")
            for layer in range(spec.layers)
            for part in ("key", "value")
        }

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def bindings(self) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """The decoder's cache inputs and outputs by name, to bind once."""
        inputs = {f"past_key_values.{name}": buffer for name, buffer in self._buffers.items()}
        outputs = {f"present.{name}": buffer for name, buffer in self._buffers.items()}
        return inputs, outputs

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions; raises ContextError, before anything is written, when they do not fit."""
        if self.length + tokens > self.capacity:
            raise ContextError(
                f"{self.length} + {tokens} tokens exceed the cache's capacity of {self.capacity}",
                "allocate a larger cache or shorten the prompt",
            )
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; raises ValueError when `length` lies beyond the end."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of length {self.length} to {length}")
        self.length = length

    def snapshot(self) -> Snapshot:
        """Copy what the cache holds."""
        rows = tuple(b.read(_SEQUENCE_AXIS, self.length) for b in self._buffers.values())
        return Snapshot(self.length, rows)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; raises ContextError when it is longer than the capacity."""
        if snapshot.length > self.capacity:
            raise ContextError(f"a snapshot of {snapshot.length} tokens exceeds the capacity of {self.capacity}")
        for buffer, rows in zip(self._buffers.values(), snapshot.rows, strict=True):
            buffer.write(_SEQUENCE_AXIS, rows)
        self.length = snapshot.length
