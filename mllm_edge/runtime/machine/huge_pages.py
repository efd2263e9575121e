"""Huge pages for weights, on Linux: a token reads all of them, and with 4 kB pages part of that time is page tables.

Measured on SmolLM2-135M's sizes, one thread: 7.2 to 9.0 ms a token before, depending on where the pages happen to lie,
6.8 to 7.0 after.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["SWITCH", "huge_pages", "new_blocks", "parse_maps"]

# Set to 0, memory stays as the system gives it.
SWITCH = "MLLM_EDGE_HUGE_PAGES"
_MAPS = Path("/proc/self/maps")
_HUGE = 2 << 20
# madvise's advice (Linux 6.1 and newer; older kernels answer with an error, and nothing happens).
_MADV_COLLAPSE = 25
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw\S* \S+ \S+ 0 *(\[heap\])?$")

Block = tuple[int, int]


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Move what the body allocates in large blocks to huge pages, where the system can; never fails."""
    before = _blocks()
    yield
    if before is None:
        return
    libc = ctypes.CDLL(None)
    for start, end in new_blocks(before, _blocks() or []):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)


def new_blocks(before: Sequence[Block], after: Sequence[Block]) -> list[Block]:
    """The parts of `after` that are not in `before`, cut to whole huge pages. Both are sorted and don't overlap."""
    found = []
    for start, end in after:
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            found.append((start, max(start, old_start)))
            start = old_end
        found.append((start, end))
    whole = ((-(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE) for start, end in found)
    return [(start, end) for start, end in whole if start < end]


def parse_maps(text: str) -> list[Block]:
    """The private writable blocks without a file in the text of /proc/PID/maps."""
    matches = (_LINE.match(line) for line in text.splitlines())
    return [(int(m[1], 16), int(m[2], 16)) for m in matches if m]


def _blocks() -> list[Block] | None:
    """None where there is nothing to be done: another system, or switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return parse_maps(_MAPS.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
