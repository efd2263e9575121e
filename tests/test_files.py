"""Files that exist whole or not at all, and what a full disk says."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mllm_edge import files
from mllm_edge.errors import WriteError
from mllm_edge.files import check_places, sync, write_whole, writing_whole


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(TypeError), writing_whole(path) as f:
        f.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    write_whole(path, b"new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert only(tmp_path) == ["file"]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_replace(a: str, b: Path) -> None:
        done.append("name")
        replace(a, b)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    write_whole(tmp_path / "file", "text")
    assert done == ["file", "name", "folder"]
    done.clear()
    sync([tmp_path / "file"])
    assert done == ["file", "folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_is_told_with_path_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_text("precious")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(WriteError, match=r"file: .* MB free, 5\.0 MB wanted") as caught:
        write_whole(path, bytes(5_000_000))
    assert "free some space" in caught.value.fix
    assert path.read_text() == "precious"
    assert only(tmp_path) == ["file"]


def test_links_are_followed_and_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_device_is_written_as_it_is() -> None:
    write_whole("/dev/null", "text")
    assert not Path("/dev/null").is_file()
    with pytest.raises(WriteError, match="/dev/full: No space left on device"):
        write_whole("/dev/full", "text")


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="is a folder"):
        check_places([tmp_path])
    with pytest.raises(WriteError, match="does not exist"):
        check_places([tmp_path / "no" / "file"])
    with pytest.raises(WriteError, match="named twice"):
        check_places([tmp_path / "a", tmp_path / "b", tmp_path / "." / "a"])
    with pytest.raises(WriteError, match=r"the folder .* does not exist") as caught:
        write_whole(tmp_path / "no" / "file", "x")
    assert caught.value.fix.startswith("mkdir -p")
