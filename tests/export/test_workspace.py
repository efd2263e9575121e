"""A bundle's place: kept for one, never without a bundle, put right after a kill."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_edge.errors import ExportError, LockedError
from mllm_edge.export import workspace as module
from mllm_edge.export.workspace import reserved, workspace


class Killed(BaseException):
    """Stands for the end of the process: nothing behind it is done."""


def bundle(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def read(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def replace(out: Path, text: str = "new") -> None:
    with reserved(out, force=True) as place, workspace(place) as folder:
        (folder / "manifest.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "rename"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How directories change places: in one step, or where the system has none."""
    if request.param == "rename":
        monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    return str(request.param)


def test_a_new_and_a_replaced_bundle(tmp_path: Path, way: str) -> None:
    replace(tmp_path / "deep" / "out", "old")
    replace(tmp_path / "deep" / "out")
    assert read(tmp_path / "deep" / "out") == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    a, b = bundle(tmp_path / "a", "a"), bundle(tmp_path / "b", "b")
    if not module._exchange(a, b):
        pytest.skip("this file system cannot exchange two names in one step (renameat2)")
    assert (read(a), read(b)) == ("b", "a")


# What the process does last before it is gone, by the name of the call and how many came before it.
STEPS = [("sync", 0), ("rename", 0), ("rename", 1), ("rmtree", 0), ("rmtree", 1), ("sync_folder", 0), ("_exchange", 0)]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step_there_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, step: tuple[str, int], after: bool
) -> None:
    out, dead, seen = bundle(tmp_path / "out", "old"), list[bool](), list[str]()

    def dying(name: str, call: Callable) -> Callable:
        def last(*args: object, **options: object) -> object:
            if dead:
                return None  # what a killed process does not do any more
            seen.append(name)
            mine = name == step[0] and seen.count(name) == step[1] + 1
            if mine and not after:
                dead.append(True)
                raise Killed
            result = call(*args, **options)
            if mine:
                dead.append(True)
                raise Killed
            return result

        return last

    with monkeypatch.context() as patch:
        for owner, name in (
            (module, "sync"),
            (module, "sync_folder"),
            (module, "_exchange"),
            (module.shutil, "rmtree"),
            (Path, "rename"),
        ):
            patch.setattr(owner, name, dying(name, getattr(owner, name)))
        patch.setattr(module.os, "getpid", lambda: 999_999_999)
        with contextlib.suppress(Killed, ExportError):
            replace(out)
    if way == "exchange":
        assert read(out) in ("old", "new")  # at every moment
    with reserved(out, force=True):
        assert read(out) in ("old", "new")  # put right by the next call
    assert names(tmp_path) == ["out"]


def test_a_set_aside_bundle_comes_back(tmp_path: Path) -> None:
    bundle(tmp_path / f".out.old-{os.getpid()}", "old")  # a number that is another process's by now
    bundle(tmp_path / ".out.export-1", "half")
    with pytest.raises(ExportError, match="exists already"), reserved(tmp_path / "out", force=False):
        pass
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_out_that_is_a_link(tmp_path: Path, way: str) -> None:
    bundle(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to("disk/real")
    replace(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert read(tmp_path / "disk" / "real") == "new"
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["real"]


def test_out_that_is_a_link_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("disk/real")
    replace(tmp_path / "out")
    assert read(tmp_path / "disk" / "real") == "new"


def test_a_second_one_changes_nothing(tmp_path: Path) -> None:
    with reserved(tmp_path / "out", force=False) as place, workspace(place) as folder:
        with pytest.raises(LockedError, match="works on it"), reserved(tmp_path / "out", force=True):
            pass
        assert folder.is_dir()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        reserved(tmp_path / "a" / "b" / "out", force=False) as place,
        workspace(place),
    ):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_full_disk_says_what_is_wanted(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out", "old")
    with (
        pytest.raises(ExportError, match=r"No space left on device .* free, 12\.0 MB wanted"),
        reserved(out, force=True) as place,
        workspace(place, 12_000_000),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read(out) == "old"
    assert names(tmp_path) == ["out"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(module, "sync", lambda paths: synced.extend(sorted(p.name for p in paths)))
    with reserved(tmp_path / "out", force=False) as place, workspace(place) as folder:
        (folder / "engines").mkdir()
        for name in ("manifest.json", "engines/x"):
            (folder / name).write_text("x")
    assert synced == ["manifest.json", "x"]


@pytest.mark.parametrize("name", ["file/out", "file"])
def test_places_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="is a file"), reserved(tmp_path / name, force=True):
        pass
    assert (tmp_path / "file").read_text() == "mine"
