"""Calibration text that comes with the package: questions of many kinds and languages, without images."""

import json
from pathlib import Path

from mllm_edge.calibration.data import Sample

__all__ = ["BUILTIN", "builtin_samples"]

BUILTIN = 128  # questions


def builtin_samples(count: int = BUILTIN) -> list[Sample]:
    """The first `count` questions, up to BUILTIN. They have no answers: the model's own, in its own chat form, are used
    (see `collect.record`). The order spreads every kind evenly, so that each beginning of the list is a fair share."""
    kinds = json.loads(Path(__file__).with_name("builtin_text.json").read_text(encoding="utf-8"))
    placed = [
        ((i + 0.5) / len(questions), kind, question)
        for kind, questions in kinds.items()
        for i, question in enumerate(questions)
    ]
    return [Sample(question, (), None, f"built-in text ({kind})") for _, kind, question in sorted(placed)[:count]]
