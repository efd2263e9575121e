"""The seam between the runtime and whatever executes graphs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.spec import Variant

__all__ = ["Backend", "Buffer", "Session", "open_backend"]


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

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run with arrays in and new arrays out; unbound outputs only."""
        ...

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Keep buffers (or arrays) bound to inputs and outputs for all later runs; contents are read at each run."""
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


def open_backend(name: str = "auto", threads: int | None = None, target: str = "cpu") -> Backend:
    """The backend called `name`; `auto` takes the best one that is installed. It executes the graphs made for `target`,
    which serves comparisons where these are another engine's.

    Raises BackendError for an unknown name or a runtime that is not installed.
    """
    if name in ("auto", "cpu"):
        from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

        return OnnxRuntimeCpu(threads, target)
    raise BackendError(f"unknown backend {name!r}", "use --backend auto or --backend cpu")
