"""Questions about scenes with their only right answers, as pure functions of a scene and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scenes import COLOURS, KINDS, MARGIN, SPLITS, Scene, Shape, make_scene, pick

TASKS = ("caption", "count", "colour", "shape", "relation", "yes/no", "number", "word")


@dataclass(frozen=True)
class Question:
    """One question about a scene, with its only right answer."""

    task: str
    question: str
    answer: str


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def _plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


def describe(scene: Scene) -> str:
    """The caption: shapes from left to right, then the number or word."""
    parts = [_a(shape.name) for shape in scene.shapes]
    if scene.text:
        parts.append(f"the {scene.text.kind} {scene.text.value}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _caption(scene: Scene, rng: np.random.Generator) -> list[Question]:
    asked = pick(rng, ("What is in the picture?", "Describe the image.", "What do you see?"))
    return [Question("caption", asked, describe(scene))]


def _counts(scene: Scene, rng: np.random.Generator) -> list[Question]:
    kinds = [shape.kind for shape in scene.shapes]
    colours = [shape.colour for shape in scene.shapes]
    asked = []
    for kind in dict.fromkeys((pick(rng, kinds), pick(rng, KINDS))):
        form = pick(rng, ("How many {} are there?", "How many {} can you see?"))
        asked.append((form.format(_plural(kind)), kinds.count(kind)))
    colour = pick(rng, colours) if rng.random() < 0.6 else pick(rng, tuple(COLOURS))
    form = pick(rng, ("How many {} shapes are there?", "How many shapes are {}?"))
    asked.append((form.format(colour), colours.count(colour)))
    if rng.random() < 0.5:
        total = pick(rng, ("How many shapes are there?", "How many shapes are in the picture?"))
        asked.append((total, len(kinds)))
    return [Question("count", question, str(answer)) for question, answer in asked]


def _attributes(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Colour of a shape that is alone of its kind; shape of the only thing of its colour."""
    kinds = [shape.kind for shape in scene.shapes]
    colours = [shape.colour for shape in scene.shapes]
    single_kinds = [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]
    single_colours = [shape for shape in scene.shapes if colours.count(shape.colour) == 1]
    questions = []
    for i in rng.permutation(len(single_kinds))[:2]:
        shape = single_kinds[i]
        form = pick(rng, ("What colour is the {}?", "What color is the {}?"))
        questions.append(Question("colour", form.format(shape.kind), shape.colour))
    for i in rng.permutation(len(single_colours))[:2]:
        shape = single_colours[i]
        form = pick(rng, ("What shape is {}?", "Which shape is {}?"))
        questions.append(Question("shape", form.format(shape.colour), shape.kind))
    return questions


def _reference(scene: Scene, shape: Shape, rng: np.random.Generator) -> str:
    """The short name where it suffices, half of the time."""
    alone = sum(other.kind == shape.kind for other in scene.shapes) == 1
    return f"the {shape.kind}" if alone and rng.random() < 0.4 else f"the {shape.name}"


def _pair(scene: Scene, rng: np.random.Generator) -> tuple[Shape, Shape, str, str]:
    """Two shapes A and B and their names."""
    i, j = rng.choice(len(scene.shapes), 2, replace=False)
    a, b = scene.shapes[i], scene.shapes[j]
    return a, b, _reference(scene, a, rng), _reference(scene, b, rng)


def _relations(scene: Scene, rng: np.random.Generator) -> list[Question]:
    if len(scene.shapes) == 1:
        return []
    questions = []
    a, b, name_a, name_b = _pair(scene, rng)
    answer = "left" if a.x < b.x else "right"
    questions.append(
        Question("relation", f"Is {name_a} left or right of {name_b}?", answer),
    )
    a, b, name_a, name_b = _pair(scene, rng)
    if abs(a.y - b.y) >= MARGIN and rng.random() < 0.6:
        answer = "above" if a.y < b.y else "below"
        questions.append(Question("relation", f"Is {name_a} above or below {name_b}?", answer))
    if rng.random() < 0.6:
        side = pick(rng, ("left", "right"))
        form = pick(rng, ("What is on the far {}?", "Which shape is furthest {}?"))
        end = scene.shapes[0] if side == "left" else scene.shapes[-1]
        questions.append(Question("relation", form.format(side), _a(end.name)))
    return questions


def _position_question(scene: Scene, rng: np.random.Generator, across: bool) -> Question | None:
    a, b, name_a, name_b = _pair(scene, rng)
    if not across and abs(a.y - b.y) < MARGIN:
        return None
    first = rng.random() < 0.5
    if across:
        forms = ("left of", "to the left of") if first else ("right of", "to the right of")
        holds = (a.x < b.x) == first
    else:
        forms = ("above", "above") if first else ("below", "below")
        holds = (a.y < b.y) == first
    asked = f"Is {name_a} {pick(rng, forms)} {name_b}?"
    return Question("yes/no", asked, "yes" if holds else "no")


def _presence_question(scene: Scene, rng: np.random.Generator) -> Question:
    """Half are there; of the others, half share a colour or a kind with something that is there."""
    present = {(shape.kind, shape.colour) for shape in scene.shapes}
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    kind, colour = shape.kind, shape.colour
    if rng.random() < 0.5:
        keep = rng.random()
        while (kind, colour) in present:
            kind = shape.kind if keep < 0.25 else pick(rng, KINDS)
            colour = shape.colour if 0.25 <= keep < 0.5 else pick(rng, tuple(COLOURS))
    form = pick(rng, ("Is there {}?", "Can you see {}?"))
    answer = "yes" if (kind, colour) in present else "no"
    return Question("yes/no", form.format(_a(f"{colour} {kind}")), answer)


def _yes_no(scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions: list[Question | None] = [_presence_question(scene, rng)]
    if len(scene.shapes) > 1:
        # Order is the hardest thing to learn here and gives one bit a question: it is asked most.
        questions += [_position_question(scene, rng, across=True) for _ in range(3)]
        questions.append(_position_question(scene, rng, across=False))
    else:
        questions.append(_presence_question(scene, rng))
    kept = [question for question in questions if question is not None]
    return list({question.question: question for question in kept}.values())


def _reading(scene: Scene, rng: np.random.Generator) -> list[Question]:
    questions = []
    forms = {
        "number": ("What number is written?", "Which number do you see?"),
        "word": ("What word is written?", "Which word do you see?"),
    }
    for kind, asked in forms.items():
        if scene.text is not None and scene.text.kind == kind:
            questions.append(Question(kind, pick(rng, asked), scene.text.value))
        elif rng.random() < 0.15:
            questions.append(Question(kind, pick(rng, asked), "none"))
    return questions


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions of one round about a scene, about a dozen, in random order."""
    makers = (_caption, _counts, _attributes, _relations, _yes_no, _reading)
    questions = [question for maker in makers for question in maker(scene, rng)]
    return [questions[i] for i in rng.permutation(len(questions))]


def held_out(split: str, count: int) -> Iterator[tuple[int, Scene, Question]]:
    """The first `count` questions of an evaluation set: (scene index, scene, question).

    Ten a scene at most; the tasks that a scene offers one question of are always among them.
    """
    done = index = 0
    while done < count:
        scene = make_scene(split, index)
        asked = ask(scene, np.random.default_rng([SPLITS[split], index, 1]))
        asked.sort(key=lambda question: question.task not in ("caption", "number", "word"))
        for question in asked[: min(10, count - done)]:
            yield index, scene, question
            done += 1
        index += 1


def training_rounds(index: int, rounds: int) -> tuple[Scene, list[list[Question]]]:
    """Training scene `index` and that many independent rounds of questions about it."""
    scene = make_scene("train", index)
    seeds = [[SPLITS["train"], index, 1 + i] for i in range(rounds)]
    return scene, [ask(scene, np.random.default_rng(seed)) for seed in seeds]
