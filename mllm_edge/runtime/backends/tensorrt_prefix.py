"""Where a cache that is appended to lies, so that a step need not be told the part of every buffer anew."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.runtime.backends.cuda_arrays import CudaArray
from mllm_edge.spec import Variant, input_of, is_state

__all__ = ["Prefix"]

_AXIS = 1


class Prefix:
    """The past of an append cache is the first rows of its buffers, and the new rows follow there.

    `follows`: what is bound is of this form, in memory of our own; `past`: its rows; `tokens`: the new rows, None where
    they have not slid since they were bound; `room`: rows that there are from where the past begins, in every buffer;
    `pairs`: inputs with their outputs.
    """

    def __init__(self, variant: Variant):
        self._appends = variant.kv_mode == "append"
        names = [t.name for t in variant.outputs if self._appends and is_state(t.name, "growing")]
        self.pairs = {input_of(name): name for name in names}
        self._outputs = {output: name for name, output in self.pairs.items()}
        self.past, self.room, self.follows = 0, 0, False
        self.tokens: int | None = None
        self._begin: dict[str, CudaArray] = {}
        self._row_bytes: dict[str, int] = {}

    @property
    def outputs(self) -> Mapping[str, str]:
        """Outputs with their inputs, of a cache that follows."""
        return self._outputs if self.follows else {}

    def concerns(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> bool:
        """Whether any of these is a part of the cache."""
        return any(name in inputs or output in outputs for name, output in self.pairs.items())

    def look(self, values: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        """See whether what is bound follows."""
        if self.tokens is not None:
            return
        bound = {name: (values[name], targets.get(output)) for name, output in self.pairs.items()}
        self.follows = self._appends and all(_follows(past, new) for past, new in bound.values())
        if self.follows and bound:
            self._begin = {name: past for name, (past, _) in bound.items()}
            self._row_bytes = {name: _row_bytes(past) for name, past in self._begin.items()}
            self.past = next(iter(self._begin.values())).shape[_AXIS]
            self.room = min(array.room // self._row_bytes[name] for name, array in self._begin.items())

    def slide(self, past: int, end: int) -> bool:
        """The past is so many rows now, the new ones go on to `end`; False where that cannot be."""
        if not self.pairs:  # a part of a decoder whose layers look at images alone
            return True
        if not self.follows or end > self.room:
            return False
        self.past, self.tokens = past, end - past
        return True

    def settle(self, values: dict[str, Any], targets: dict[str, Any]) -> None:
        """Bind what slid as it lies now."""
        for name, output in self.pairs.items():
            values[name] = replace(self._begin[name], shape=self.shape(name))
            address, row = self.place(name)
            shape = (*targets[output].shape[:_AXIS], self.tokens, *targets[output].shape[_AXIS + 1 :])
            targets[output] = replace(targets[output], address=address + self.past * row, shape=shape)
        self.tokens = None

    def place(self, name: str) -> tuple[int, int]:
        """Where the past of an input begins, and the bytes of a row."""
        return self._begin[name].address, self._row_bytes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the past of an input."""
        shape = self._begin[name].shape
        return (*shape[:_AXIS], self.past, *shape[_AXIS + 1 :])


def _row_bytes(past: CudaArray) -> int:
    return math.prod(past.shape[_AXIS + 1 :]) * past.dtype.itemsize


def _follows(past: Any, new: Any) -> bool:
    both = isinstance(past, CudaArray) and isinstance(new, CudaArray)
    return both and past.aligned and new.address == past.address + past.nbytes and past.room >= past.nbytes + new.nbytes
