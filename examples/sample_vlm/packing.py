"""Training data: rendered scenes, and rounds of questions packed behind one image prefix.

A packed row is the image prefix followed by blocks of one question and answer each. Every block
sees the prefix and itself, at positions that restart behind the prefix, so that a block is exactly
the prompt that the processor makes of this question alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import scenes
from layout import END, FAKE, GLOBAL, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, START
from PIL import Image
from questions import Question, training_rounds
from tokenizers import Tokenizer

Encoder = Callable[[str], list[int]]
Row = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class DataPlan:
    """What is rendered; `length` is the tokens of a packed row, prefix included."""

    scenes: int
    rounds: int = 2
    length: int = 288


@dataclass(frozen=True)
class Data:
    """Memory-mapped arrays; N scenes, R rounds, L tokens.

    `pixels` uint8[N, 128, 128, 3], `labels` uint8[N, 3, 256]; `ids` int16[N, R, L]; `block`
    uint8[N, R, L]: 0 prefix, 1, 2, ... questions, 255 padding; `answer` uint8[N, R, L]: 1 where a
    token is to be predicted, more where its question is weighed up.
    """

    pixels: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    block: np.ndarray
    answer: np.ndarray


def corpus(count: int) -> Iterator[str]:
    """Texts for the tokenizer: questions and answers of the first scenes, and the two roles."""
    for index in range(count):
        for question in training_rounds(index, 1)[1][0]:
            yield question.question
            yield f" {question.answer}"
    for text in (suffix_text().removeprefix(END), "User:", "User: ", "Assistant: "):
        yield from [text] * 1000


def prefix_text() -> str:
    """What the processor puts before a question about one image."""
    return f"{START}User:{FAKE}{GLOBAL}{IMAGE * IMAGE_TOKENS}{FAKE}"


def suffix_text() -> str:
    """What follows the question, up to the first token of the answer."""
    return f"{END}\nAssistant:"


def weight(item: Question) -> int:
    """What is above what is asked less than left or right, and learnt last: it weighs four."""
    return 4 if "above" in item.question or "below" in item.question else 1


def pack(questions: list[Question], encode: Encoder, length: int) -> Row:
    """Ids, block numbers and answer weights of one row; questions that don't fit are left out.

    Long answers go first, because what is left out should not always be the captions.
    """
    ids = encode(prefix_text())
    block, answer = [0] * len(ids), [0] * len(ids)
    suffix = encode(suffix_text())
    number = 0
    for item in sorted(questions, key=lambda item: -len(item.answer)):
        asked = encode(item.question) + suffix
        told = [*encode(f" {item.answer}"), *encode(END)]
        if len(ids) + len(asked) + len(told) > length:
            continue
        number += 1
        ids += asked + told
        block += [number] * (len(asked) + len(told))
        answer += [0] * len(asked) + [weight(item)] * len(told)
    spare = length - len(ids)
    return (
        np.array(ids + [0] * spare, np.int16),
        np.array(block + [255] * spare, np.uint8),
        np.array(answer + [0] * spare, np.uint8),
    )


def shrink(image: Image.Image) -> np.ndarray:
    """Pixels uint8[128, 128, 3], resized as the model's image processor does."""
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


_encoders: dict[str, Encoder] = {}


def encoder(tokenizer_file: str) -> Encoder:
    """Text to ids, with a memory: questions come from a small set."""
    if tokenizer_file not in _encoders:
        tokenizer = Tokenizer.from_file(tokenizer_file)
        known: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            if text not in known:
                known[text] = tokenizer.encode(text, add_special_tokens=False).ids
            return known[text].copy()

        _encoders[tokenizer_file] = encode
    return _encoders[tokenizer_file]


def _shapes(plan: DataPlan) -> dict[str, tuple[tuple[int, ...], type]]:
    n, rows = plan.scenes, (plan.scenes, plan.rounds, plan.length)
    return {
        "pixels": ((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        "labels": ((n, 3, scenes.GRID**2), np.uint8),
        "ids": (rows, np.int16),
        "block": (rows, np.uint8),
        "answer": (rows, np.uint8),
    }


def _fill(folder: Path, plan: DataPlan, tokenizer_file: str, span: tuple[int, int]) -> int:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _shapes(plan)}
    encode = encoder(tokenizer_file)
    for index in range(*span):
        scene, rounds = training_rounds(index, plan.rounds)
        arrays["pixels"][index] = shrink(scenes.render(scene))
        arrays["labels"][index] = scenes.patch_labels(scene)
        for r, questions in enumerate(rounds):
            row = pack(questions, encode, plan.length)
            arrays["ids"][index, r], arrays["block"][index, r], arrays["answer"][index, r] = row
    return span[1] - span[0]


def prepare(folder: Path, plan: DataPlan, tokenizer_file: Path, workers: int) -> Data:
    """Render the training data into `folder`, or reuse what the same plan left there."""
    done = folder / "data.json"
    stamp = json.dumps([plan.scenes, plan.rounds, plan.length, tokenizer_file.read_text()])
    if not done.exists() or done.read_text() != stamp:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        for name, (shape, dtype) in _shapes(plan).items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
        spans = [(i, min(i + 250, plan.scenes)) for i in range(0, plan.scenes, 250)]
        fill = partial(_fill, folder, plan, str(tokenizer_file))
        with get_context("spawn").Pool(workers) as pool:
            count = 0
            for part in pool.imap_unordered(fill, spans):
                count += part
                if count % 5000 == 0:
                    print(f"rendered {count} of {plan.scenes} scenes", flush=True)
        done.write_text(stamp)
    return Data(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _shapes(plan)})
