"""How numbers and tables look, and how progress is drawn."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_edge.cli.output import bytes_text, milliseconds, table, write_answer
from mllm_edge.cli.progress import StageBars, StageLines, stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (34_500_000, "34.5 MB"), (1_250_000_000, "1.25 GB")],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert bytes_text(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0012345, "1.23"), (0.01234, "12.3"), (1.2345, "1234")])
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_table_aligns_numbers_to_the_right() -> None:
    assert table(["name", "a", "b"], [["x", "1", ""], ["long name", "22", "3"]]) == (
        "name        a  b\nx           1\nlong name  22  3"
    )


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, text in ((Terminal(), "a[2J\tb\n"), (io.StringIO(), "a\x1b[2J\tb\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        write_answer("a\x1b[2J\tb\n")
        assert stream.getvalue() == text


def test_one_line_a_stage_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with stages() as progress:
        assert isinstance(progress, StageLines)
        progress.stage("first", 10)
        progress.advance(10)
        progress.stage("second")
    assert sys.stderr.getvalue() == "first\nsecond\n"  # type: ignore[attr-defined]


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with stages() as progress:
        assert isinstance(progress, StageBars)
        progress.stage("first", 10)
        progress.advance(4)
        progress.stage("second")
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "first" in text
    assert "100%" in text
    assert text.rstrip("\n").endswith(" s")


def test_progress_can_end_the_work() -> None:
    def check() -> None:
        raise KeyError("stop")

    for progress in (StageLines(check), StageBars(check)):
        with pytest.raises(KeyError):
            progress.stage("first")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, which is always full")
@pytest.mark.parametrize(
    "verb", [["inspect"], ["inspect", "--json"], ["run", "Hi", "--max-new-tokens", "2", "--quiet"]]
)
def test_a_full_disk_under_standard_output(environment: dict[str, str], tiny_bundle: Path, verb: list[str]) -> None:
    command = [sys.executable, "-m", "mllm_edge", verb[0], str(tiny_bundle), *verb[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: standard output: No space left on device\n  fix: free some space, or send the output elsewhere\n"
    )
