"""ONNX Runtime's memory arena, without memory: which of its bytes a run touches.

A session takes memory from the system in regions, each at least twice the last, and gives parts of them out: the
smallest free part that is large enough, cut in two where at least half of it would be left. Freed neighbours become one
part again, and nothing goes back to the system. What no part was ever given of stays untouched, and costs nothing.
(onnxruntime/core/framework/bfc_arena.cc, with its defaults.)
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

__all__ = ["Arena"]

_ALIGNED = 256
_FIRST = 1 << 20  # bytes of the first region
_LARGEST = 1 << 30  # regions grow no further, but for what asks for more
_WASTE = 128 << 20  # more is never left over in a part


@dataclass
class _Part:
    """`size` bytes from `start` on, `used` or free; its neighbours `before` and `behind` in the region."""

    start: int
    size: int
    used: bool = False
    before: "_Part | None" = None
    behind: "_Part | None" = None


class Arena:
    """The arena of one session."""

    def __init__(self) -> None:
        self._next, self._end = _FIRST, 0
        self._free: list[tuple[int, int]] = []  # size and start, sorted
        self._parts: dict[int, _Part] = {}
        self._touched: list[tuple[int, int]] = []

    def allocate(self, nbytes: int) -> int:
        """A handle of so many bytes, which are touched; 0 of none."""
        if not nbytes:
            return 0
        size = -(-nbytes // _ALIGNED) * _ALIGNED
        place = bisect_left(self._free, (size, 0))
        if place == len(self._free):
            self._extend(size)
            place = bisect_left(self._free, (size, 0))
        part = self._parts[self._free.pop(place)[1]]
        if part.size >= 2 * size or part.size - size >= _WASTE:
            rest = _Part(part.start + size, part.size - size, before=part, behind=part.behind)
            if part.behind is not None:
                part.behind.before = rest
            part.size, part.behind = size, rest
            self._parts[rest.start] = rest
            insort(self._free, (rest.size, rest.start))
        part.used = True
        self._touch(part.start, part.start + nbytes)
        return part.start

    def free(self, handle: int) -> None:
        """Give back what `allocate` gave out."""
        if not handle:
            return
        part = self._parts[handle]
        part.used = False
        for first, second in ((part, part.behind), (part.before, part)):
            if first is None or second is None or first.used or second.used:
                continue
            for joined in (first, second):
                if joined is not part:
                    self._free.remove((joined.size, joined.start))
            first.size, first.behind = first.size + second.size, second.behind
            if second.behind is not None:
                second.behind.before = first
            del self._parts[second.start]
            part = first
        insort(self._free, (part.size, part.start))

    @property
    def touched(self) -> int:
        """Bytes that were ever given out."""
        return sum(end - start for start, end in self._touched)

    def _extend(self, size: int) -> None:
        grown = self._next < size
        while self._next < size:
            self._next *= 2
        region = _Part(self._end + _ALIGNED, self._next)  # apart from the one before: they never join
        self._end = region.start + region.size
        self._parts[region.start] = region
        insort(self._free, (region.size, region.start))
        if not grown:
            self._next = min(2 * self._next, max(_LARGEST, self._next))

    def _touch(self, start: int, end: int) -> None:
        near = [span for span in self._touched if span[0] <= end and start <= span[1]]
        if near:
            start, end = min(start, *(span[0] for span in near)), max(end, *(span[1] for span in near))
            self._touched = [span for span in self._touched if span not in near]
        self._touched.append((start, end))
