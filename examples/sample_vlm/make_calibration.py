"""Writes calibration data for the sample model: pictures, and questions with answers as a JSONL file.

python examples/sample_vlm/make_calibration.py DIR [--count 256]

The scenes, clean and hard by turns, are in no evaluation set and in no training set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scenes
from questions import Question, ask

if TYPE_CHECKING:
    from PIL.Image import Image

# Scenes from here on are in no evaluation.
_FIRST = 50_000
_PER_SCENE = 4


def samples(count: int) -> Iterator[tuple[str, Image, Question]]:
    """`count` questions: the name of the scene, its picture, the question with its answer."""
    done, index = 0, _FIRST
    while done < count:
        scene = scenes.make_scene(("clean", "hard")[index % 2], index)
        picture = scenes.render(scene)
        for question in ask(scene, np.random.default_rng(index))[: min(_PER_SCENE, count - done)]:
            yield f"{index}", picture, question
            done += 1
        index += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, picture, question in samples(options.count):
        picture.save(options.folder / f"{name}.png")
        line = {"images": [f"{name}.png"], "prompt": question.question, "answer": question.answer}
        lines.append(json.dumps(line))
    (options.folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
