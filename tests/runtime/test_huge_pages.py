"""Huge pages: which blocks are new, and that memory keeps its contents."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge.runtime.machine import huge_pages as module
from mllm_edge.runtime.machine.huge_pages import huge_pages, new_blocks, parse_maps

MB = 1 << 20
MAPS = """\
00400000-00500000 r-xp 00000000 08:01 42                                 /usr/bin/python3
00600000-00a00000 rw-p 00200000 08:01 42                                 /usr/bin/python3
01000000-03000000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
7f0002000000-7f0003000000 r--p 00000000 00:00 0
7f0004000000-7f0005000000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_writable_memory_without_a_file_counts() -> None:
    assert parse_maps(MAPS) == [(0x01000000, 0x03000000), (0x7F0000000000, 0x7F0001000000)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [(4, 8)], [(4, 8)]),
        ([(4, 8)], [(4, 8)], []),
        ([(4, 8)], [(2, 12)], [(2, 4), (8, 12)]),
        ([(4, 6), (8, 10)], [(4, 14)], [(6, 8), (10, 14)]),
        ([(0, 20)], [(4, 8), (18, 24)], [(20, 24)]),
        ([], [(3, 5)], []),
        ([], [(3, 7)], [(4, 6)]),
    ],
)
def test_new_blocks_are_cut_to_whole_pages(
    before: list[tuple[int, int]], after: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    def scaled(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(start * MB, end * MB) for start, end in blocks]

    assert new_blocks(scaled(before), scaled(after)) == scaled(expected)


def test_contents_stay() -> None:
    with huge_pages():
        array = np.arange(8 * MB, dtype=np.uint32)
    np.testing.assert_array_equal(array, np.arange(8 * MB, dtype=np.uint32))


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MAPS", tmp_path / "gone")
    monkeypatch.setattr(module.ctypes, "CDLL", None)  # would fail
    with huge_pages():
        pass


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.SWITCH, "0")
    monkeypatch.setattr(module.ctypes, "CDLL", None)  # would fail
    with huge_pages():
        pass
