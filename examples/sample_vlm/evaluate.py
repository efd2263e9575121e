"""Scores a model directory or an exported bundle on held-out questions, by exact match.

    python examples/sample_vlm/evaluate.py examples/sample_vlm/model
    python examples/sample_vlm/evaluate.py bundle --set hard --json scores.json --answers a.jsonl

A directory with a manifest.json is a bundle and is run by mllm_edge, without torch; any other is a
transformers checkpoint and is run in float32. Decoding is greedy, so that two runs can be compared
token for token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import scenes
from questions import TASKS, held_out

if TYPE_CHECKING:
    from PIL.Image import Image

END = "<end_of_utterance>"
MAX_NEW_TOKENS = 48
BATCH = 50


@dataclass(frozen=True)
class Item:
    """One question; `image` is shared by all questions of a scene."""

    scene: int
    task: str
    question: str
    expected: str
    image: Image


@dataclass(frozen=True)
class Answer:
    """What a model said: text without special tokens, ids without the end token."""

    text: str
    token_ids: list[int]


def items(split: str, count: int) -> Iterator[Item]:
    picture: Image | None = None
    last = -1
    for index, scene, question in held_out(split, count):
        if picture is None or index != last:
            picture, last = scenes.render(scene), index
        yield Item(index, question.task, question.question, question.answer, picture)


def until(ids: Iterable[int], end: int | None) -> list[int]:
    kept = []
    for token in ids:
        if token == end:
            break
        kept.append(int(token))
    return kept


def run_transformers(folder: Path, asked: Iterator[Item]) -> Iterator[tuple[Item, Answer]]:
    import torch
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    processor = Idefics3Processor.from_pretrained(
        folder, image_processor=Idefics3ImageProcessorPil.from_pretrained(folder)
    )
    model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    end = processor.tokenizer.convert_tokens_to_ids(END)
    while batch := list(islice(asked, BATCH)):
        prompts = []
        for item in batch:
            parts: list[dict] = [{"type": "image"}, {"type": "text", "text": item.question}]
            turns: list[dict] = [{"role": "user", "content": parts}]
            prompts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
        images = [[item.image] for item in batch]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for item, row in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ids = until(row, end)
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            yield item, Answer(text.strip(), ids)


def run_bundle(folder: Path, asked: Iterator[Item]) -> Iterator[tuple[Item, Answer]]:
    from tokenizers import Tokenizer

    from mllm_edge import VLM

    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(END)
    with VLM.load(folder) as vlm:
        for item in asked:
            result = vlm.generate(item.question, images=[item.image], max_new_tokens=MAX_NEW_TOKENS)
            yield item, Answer(result.text.strip(), until(result.token_ids, end))


def percent(hits: list[bool]) -> float:
    return round(100 * sum(hits) / len(hits), 2)


def score(answered: list[tuple[Item, Answer]]) -> dict:
    """Percent of exact matches, over all and by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for item, answer in answered:
        right[item.task].append(answer.text == item.expected)
    every = [hit for hits in right.values() for hit in hits]
    return {
        "exact_match": percent(every),
        "tasks": {task: percent(right[task]) for task in TASKS if task in right},
        "questions": len(every),
    }


def table(result: dict, counts: dict[str, int]) -> str:
    rows = [f"{'task':<10}{'questions':>10}{'exact match':>13}"]
    for task, percent in result["tasks"].items():
        rows.append(f"{task:<10}{counts[task]:>10}{percent:>12.2f}%")
    rows.append(f"{'all':<10}{result['questions']:>10}{result['exact_match']:>12.2f}%")
    return "\n".join(rows)


def answer_line(item: Item, answer: Answer) -> str:
    fields = {"scene": item.scene, "task": item.task, "question": item.question}
    return json.dumps({**fields, "expected": item.expected, **asdict(answer)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="transformers directory or mllm-edge bundle")
    parser.add_argument("--set", choices=("clean", "hard"), default="clean", dest="split")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--answers", type=Path, help="write one JSON line per question here")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if not options.model.is_dir():
        print(f"error: {options.model} is not a directory", file=sys.stderr)
        return 2
    run = run_bundle if (options.model / "manifest.json").exists() else run_transformers
    began = time.perf_counter()
    answered = list(run(options.model, items(options.split, options.questions)))
    result = score(answered)
    counts = {task: sum(item.task == task for item, _ in answered) for task in result["tasks"]}
    print(table(result, counts))
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.answers:
        lines = [answer_line(item, answer) for item, answer in answered]
        options.answers.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
