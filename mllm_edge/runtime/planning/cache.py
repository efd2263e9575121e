"""What the decoder's cache takes: how large it is allocated, and what of it the system really gives."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mllm_edge.spec import ModelSpec, Variant

__all__ = ["cache_bytes"]

# Linux gives memory page by page when it is written; huge pages are asked for where an array has 4 MB or more.
_PAGE, _HUGE_PAGE, _HUGE_ARRAY = 4 << 10, 2 << 20, 4 << 20
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cache_bytes(model: ModelSpec, decoder: Variant, capacity: int, tokens: int) -> tuple[int, int]:
    """Bytes of a cache for `capacity` tokens: as it is allocated, and what is resident when it holds `tokens`."""
    types = {tensor.name: np.dtype(tensor.dtype).itemsize for tensor in decoder.inputs}
    allocated = resident = 0
    for heads, row, times in _arrays(model, types, capacity, decoder.kv_mode != "append"):
        whole = heads * capacity * row
        page = _HUGE_PAGE if whole >= _HUGE_ARRAY and _huge_pages() else _PAGE
        written = heads * min(capacity * row, math.ceil(tokens * row / page) * page)
        allocated += times * whole
        resident += times * min(whole, written)
    for spec in model.state:
        if spec.kind != "growing":
            nbytes = 2 * spec.values(1) * types[spec.inputs[0]]
            allocated, resident = allocated + nbytes, resident + nbytes
    return allocated, resident


def _arrays(model: ModelSpec, types: dict[str, int], capacity: int, by_head: bool) -> Iterator[tuple[int, int, int]]:
    """Of growing state: how many parts an array has that begin anew, the bytes of a token in one, how many arrays."""
    for spec in model.state:
        if spec.kind == "growing":
            heads, size = spec.shape
            itemsize = types[spec.inputs[0]]
            parts, row = (heads, size * itemsize) if by_head else (1, heads * size * itemsize)
            yield parts, row, len(spec.names)


def _huge_pages() -> bool:
    """Whether the system gives huge pages where they are asked for."""
    try:
        return "[never]" not in _SWITCH.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
