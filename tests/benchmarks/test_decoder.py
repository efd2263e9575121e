"""The decoder benchmark's own logic: ratios within a round, and the exchange with a worker process."""

import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import GEOMETRIES
from benchmarks.decoder import BLOCK, median_of_ratios
from benchmarks.worker import WARM_STEPS, Worker

ENGINE = """
from benchmarks.worker import serve

class Engine:
    steps = 0
    def prefill(self, ids):
        print("a library prints this")
        if len(ids) > 2:
            raise ValueError("too long a prompt")
        self.steps = 0
    def step(self):
        self.steps += 1
    def logits(self, ids):
        return [float(i) for i in ids] + [float(self.steps)]

serve(Engine)
"""
# The benchmark's worker takes its memory from /proc and stops processes by signals: it runs on Linux alone.
linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark's worker needs Linux's /proc")


def test_ratios_are_taken_within_a_round() -> None:
    # The second round ran on a machine of half the speed: both contenders halve, and the ratio stays.
    assert median_of_ratios([100.0, 50.0, 100.0], [200.0, 100.0, 50.0]) == 0.5


def test_the_block_divides_every_row() -> None:
    for name, geometry in GEOMETRIES.items():
        assert geometry.hidden_size % BLOCK[name] == geometry.intermediate_size % BLOCK[name] == 0


@linux
def test_worker_measures_answers_and_is_stopped_between_requests(tmp_path: Path) -> None:
    with Worker("engine", [sys.executable, "-c", ENGINE], tmp_path / "log") as worker:
        measured = worker.measure([1, 2], 3)
        assert measured.prefill > 0
        assert measured.step > 0
        assert worker.logits([7]) == [7.0, WARM_STEPS + 3.0]
        assert worker.memory().peak >= worker.memory().anonymous > 0
        state = Path(f"/proc/{worker._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state == "T"
    assert worker._process.returncode is not None


@linux
def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with (
        Worker("engine", [sys.executable, "-c", ENGINE], tmp_path / "log") as worker,
        pytest.raises(SystemExit, match="too long a prompt"),
    ):
        worker.measure([1, 2, 3], 0)
