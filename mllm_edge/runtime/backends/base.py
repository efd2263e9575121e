"""The seam between the runtime and whatever executes graphs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm_edge.spec import Variant

__all__ = ["BACKENDS", "HIDDEN", "TENSORRT", "Backend", "Buffer", "Keeping", "Session", "Sliding"]

TENSORRT = ("tensorrt", "tensorrt-10.3")
# What `attention_bias` holds for what a token may not see: within half precision's range; e^−30000 is 0 in every type.
HIDDEN = -30000.0
BACKENDS = ("auto", "cpu", "cuda", *TENSORRT)


class Buffer(Protocol):
    """Memory that a session reads and writes in place, and that outlives a run."""

    @property
    def nbytes(self) -> int: ...

    def read(self, axis: int, length: int) -> np.ndarray:
        """A copy of the first `length` entries along `axis`."""
        ...

    def write(self, axis: int, values: np.ndarray) -> None:
        """Overwrite the first entries along `axis` by `values`."""
        ...

    def part(self, axis: int, start: int, stop: int) -> "Buffer":
        """The entries start … stop − 1 along `axis` as a buffer of their own over the same memory; the part must be
        contiguous (all dimensions before `axis` are 1)."""
        ...


class Session(Protocol):
    """One opened component."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest size of a symbolic dimension, where there is one; caches must have exactly `capacity`.
        `past`: behind runs of more than MOST_ROWS tokens. `top_logits`: how many of the largest logits of a row the
        session finds itself, see `top_logits.py`."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run with arrays in and new arrays out; unbound outputs only. What is fed stays bound, and its contents are
        read at each run, unless the array is read-only: then it is taken to stay as it is until another is given."""
        ...

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Keep buffers (or arrays) bound to inputs and outputs for all later runs; contents are read at each run.
        Outputs that `limits["top_logits"]` stands for are left out unless bound; None for one of them unbinds it."""
        ...


@runtime_checkable
class Sliding(Protocol):
    """A session that need not be told each part of a cache it appends to: that would take longer than a step."""

    def slide(self, past: int, end: int) -> bool:
        """The growing state is bound as parts of the same buffers as before, but the past ends with `past` rows, and
        the present goes on from there to `end`. False: bind the parts."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A session whose engine compiles while it runs."""

    def keep(self) -> None:
        """Write what was compiled since it was opened, so that it need not be again."""
        ...


class Backend(Protocol):
    """Opens components. `target` says which variants it executes."""

    name: str
    target: str

    def open(self, path: Path, variant: Variant) -> Session:
        """Open a component's graph; raises BackendError when the runtime refuses it."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zeroed memory where this backend's sessions want it."""
        ...
