"""Chooses the example pictures: scenes of a held-out seed that the model answers rightly.

python examples/sample_vlm/make_images.py examples/sample_vlm/model --out examples/images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import numpy as np
import scenes
from questions import TASKS, Question, ask, describe

CIRCLES = "How many circles are there?"


def _has(scene: scenes.Scene, shapes: int, text: str | None) -> bool:
    return len(scene.shapes) == shapes and (scene.text.kind if scene.text else None) == text


def _characters(scene: scenes.Scene) -> int:
    return len(scene.text.value) if scene.text else 0


def _circles(scene: scenes.Scene) -> int:
    return sum(shape.kind == "circle" for shape in scene.shapes)


WANTED: dict[str, Callable[[scenes.Scene], bool]] = {
    "circles": lambda scene: _has(scene, 4, None) and _circles(scene) == 3,
    "number": lambda scene: _has(scene, 3, "number") and _characters(scene) == 4,
    "sign": lambda scene: _has(scene, 3, "word") and _circles(scene) == 2,
    "pair": lambda scene: _has(scene, 2, None),
    "crowd": lambda scene: _has(scene, 4, "number") and _circles(scene) == 2,
    "word": lambda scene: _has(scene, 4, "word"),
    "single": lambda scene: _has(scene, 1, "number"),
    "blocks": lambda scene: _has(scene, 4, None) and scene.backdrop.kind == "blocks",
}
"""Picture names and what each shows."""


def questions(scene: scenes.Scene, index: int) -> list[Question]:
    """One question a task, the count of circles always among them."""
    asked = ask(scene, np.random.default_rng([4, index, 1]))
    first = {question.task: question for question in reversed(asked) if question.answer != "none"}
    first["count"] = Question("count", CIRCLES, str(_circles(scene)))
    first["caption"] = Question("caption", "What is in the picture?", describe(scene))
    return [first[task] for task in TASKS if task in first]


def answered_rightly(model: Path, scene: scenes.Scene, index: int) -> bool:
    """Every question of three rounds and of the list above."""
    image = scenes.render(scene)
    asked = questions(scene, index)
    for turn in (2, 3, 4):
        asked += ask(scene, np.random.default_rng([4, index, turn]))
    listed = (evaluate.Item(index, q.task, q.question, q.answer, image) for q in asked)
    run = evaluate.run_transformers(model, listed)
    return all(answer.text == item.expected for item, answer in run)


def chosen(model: Path) -> Iterator[tuple[str, int, scenes.Scene]]:
    index = 0
    for name, fits in WANTED.items():
        scene = scenes.make_scene("example", index)
        while not (fits(scene) and answered_rightly(model, scene, index)):
            index += 1
            scene = scenes.make_scene("example", index)
        yield name, index, scene
        index += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, index, scene in chosen(options.model):
        scenes.render(scene).save(options.out / f"{name}.png", optimize=True)
        for question in questions(scene, index):
            entry = {"image": f"{name}.png", "task": question.task}
            entries.append({**entry, "question": question.question, "answer": question.answer})
    (options.out / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
