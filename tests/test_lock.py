"""One process at a time works on a directory, by whatever name it is called."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_edge import lock
from mllm_edge.errors import LockedError
from mllm_edge.lock import locked

HOLD = """
import sys, pathlib
from mllm_edge.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_is_told_who_works_there(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as held:
        assert held
        with (
            pytest.raises(LockedError, match=rf"process {os.getpid()} on .*, since \d") as caught,
            locked(tmp_path / "out"),
        ):
            pass
        assert "wait until it is done" in caught.value.fix
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_names_of_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["real", "./real/../real", "link", "folder/real", str(tmp_path / "real"), "real/"]
    with locked(Path("link")):
        for name in names:
            with pytest.raises(LockedError), locked(Path(name)):
                pass


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} "), locked(tmp_path / "out"):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out") as held:
        assert held


def test_whoever_opened_a_file_that_is_removed_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, calls = tmp_path / ".out.lock", lock._lock, []

    def late(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:  # the one before us lets go between our opening and our locking
            path.unlink()
        real(handle)

    monkeypatch.setattr(lock, "_lock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2
        assert path.exists()


def test_a_file_system_without_locks_and_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_lock", none)
        with locked(tmp_path / "out") as held:
            assert not held

    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock.os, "open", denied)
    with locked(tmp_path / "out") as held:
        assert not held


def test_a_note_that_cannot_be_read(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        (tmp_path / ".out.lock").write_text("{")
        with pytest.raises(LockedError, match="another process works on it"), locked(tmp_path / "out"):
            pass
