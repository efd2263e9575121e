"""Calibration data: every source, every mistake by file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge.calibration.data import Sample, load_samples, split
from mllm_edge.errors import DataError


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
