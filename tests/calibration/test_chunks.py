"""Work in pieces: every row once, errors come out."""

import threading

import pytest

from mllm_edge.graph import chunks
from mllm_edge.graph.chunks import for_each_chunk


@pytest.mark.parametrize("cpus", [1, 3])
@pytest.mark.parametrize(("rows", "row"), [(0, 4), (1, 4), (7, 4), (100, 4), (9, 1000), (5, 0)])
def test_every_row_is_worked_on_once(monkeypatch: pytest.MonkeyPatch, cpus: int, rows: int, row: int) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 12)
    monkeypatch.setattr(chunks, "_cpus", lambda: cpus)
    seen, lock = [], threading.Lock()

    def work(start: int, stop: int) -> None:
        with lock:
            seen.extend(range(start, stop))

    for_each_chunk(rows, row, work)
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("cpus", [1, 3])
def test_an_error_is_raised(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 1)
    monkeypatch.setattr(chunks, "_cpus", lambda: cpus)

    def work(start: int, stop: int) -> None:
        if start == 5:
            raise OverflowError("row 5")

    with pytest.raises(OverflowError, match="row 5"):
        for_each_chunk(9, 1, work)
