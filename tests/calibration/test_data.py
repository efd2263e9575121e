"""Calibration data: every source, every mistake by file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge.calibration.data import Sample, load_samples, readable, split
from mllm_edge.errors import DataError
from mllm_edge.runtime.prompt.image import load_image


def images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)


def jsonl(folder: Path, *lines: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_folder_of_images_by_name(tmp_path: Path) -> None:
    images(tmp_path, "b.png", "a.PNG", "c.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    samples = load_samples(tmp_path, "What is wrong here?")
    assert [s.images[0].name for s in samples] == ["a.PNG", "b.png", "c.jpg"]  # type: ignore[union-attr]
    assert {s.prompt for s in samples} == {"What is wrong here?"}
    assert {s.answer for s in samples} == {None}


def test_lines_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    path = jsonl(tmp_path, {"images": ["a.png", "b.png"], "prompt": "Same?", "answer": "no"}, "", {"prompt": "Hello"})
    first, second = load_samples(path)
    assert first.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert first.answer == "no"
    assert second.images == ()
    assert second.where == f"{path}, line 3"


def test_iterable_takes_any_image_source() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    ready = Sample("x", (), None, "mine")
    samples = load_samples([{"image": frame, "prompt": "What?"}, ready])
    assert samples[0].images[0] is frame
    assert samples[1] is ready


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: list instead of an object"),
        ({"images": []}, "line 2: no prompt"),
        ({"prompt": "  "}, "line 2: no prompt"),
        ({"prompt": "x", "images": "a.png"}, "line 2: images is str, not a list"),
        ({"prompt": "x", "images": [3]}, "line 2: 3 is no path"),
        ({"prompt": "x", "images": ["gone.png"]}, "line 2: there is no image"),
        ({"prompt": "x", "answer": 7}, "line 2: the answer is int"),
        ({"prompt": "x", "anwser": "y"}, "line 2: unknown field 'anwser'"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: Any, what: str) -> None:
    path = jsonl(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(DataError, match=what):
        load_samples(path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_samples(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no image files"):
        load_samples(tmp_path)
    with pytest.raises(DataError, match="holds no samples"):
        load_samples([])
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_samples(binary)


def test_split_depends_on_content_alone() -> None:
    samples = [Sample(f"question {i}", (), None, "") for i in range(40)]
    used, kept = split(samples, 10)
    assert (len(used), len(kept)) == (30, 10)
    assert used + kept != samples
    _, again = split(samples[::-1], 10)
    assert {s.prompt for s in again} == {s.prompt for s in kept}
    assert [s.prompt for s in kept] == [s.prompt for s in samples if s in kept]


# ---------------------------------------------------------------- folders in folders, lines, bad pictures
def test_folders_in_the_folder_in_natural_order(tmp_path: Path) -> None:
    for name in ("b", "a10", "a9", ".hidden"):
        (tmp_path / name).mkdir()
    images(tmp_path, "10.png", "9.png", "b/x.png", "a10/x.png", "a9/2.png", "a9/10.png", ".hidden/x.png", ".x.png")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    samples = load_samples(tmp_path)
    found = [s.images[0].relative_to(tmp_path).as_posix() for s in samples]  # type: ignore[union-attr]
    assert found == ["9.png", "10.png", "a9/2.png", "a9/10.png", "a10/x.png", "b/x.png"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x1d", "\x1e", "\x0b", "\x0c", "\r"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "data.jsonl"
    kept = mark if mark > "\x1f" else ""  # control characters stand between values, where JSON has white space
    lines = [json.dumps({"prompt": f"What is{kept} it?"}, ensure_ascii=False) for _ in range(2)]
    end = "\r\n" if mark == "\r" else "\n"
    path.write_bytes(b"\xef\xbb\xbf" + end.join([*lines, ""]).encode())
    assert [s.prompt for s in load_samples(path)] == [f"What is{kept} it?"] * 2


def test_a_line_that_is_nested_too_deep(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        load_samples(jsonl(tmp_path, "[" * 100_000))


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png") as caught:
        readable(load_samples(tmp_path), skip=False)
    assert "--skip-bad" in caught.value.fix
    good, bad = readable(load_samples(tmp_path), skip=True)
    assert [s.images[0].name for s in good] == ["a.png", "c.png"]  # type: ignore[union-attr]
    assert len(bad) == 1
    assert "b.png" in bad[0]


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    path = jsonl(tmp_path, {"image": "a.png", "prompt": "?"}, {"image": "gone.png", "prompt": "?"})
    with pytest.raises(DataError, match=r"line 2: there is no image .*gone\.png") as caught:
        load_samples(path)
    assert "--skip-bad" in caught.value.fix
    good, bad = readable(load_samples(path, missing_images=True), skip=True)
    assert len(good) == 1
    assert "line 2" in bad[0]
    assert "gone.png" in bad[0]


def test_an_open_file_is_read_once(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    with (tmp_path / "a.png").open("rb") as f:
        good, _ = readable(load_samples([{"image": f, "prompt": "?"}]), skip=False)
    assert load_image(good[0].images[0]).size == (8, 8)
