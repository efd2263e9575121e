"""What an answer costs that a JSON schema guides, and whether such answers are what they should be.

python -m benchmarks.json_cost [BUNDLE] [--schemas N] [--rounds N] [--json F]

The cost: the time of a token under a schema over that of the same tokens without one, by turns, the first token of an
answer left out; medians of the rounds. Greedy, and at temperature 1, where the likeliest token is never enough. What a
schema forces takes no step of its own; the rows "one by one" are without that, so that they show what following the
schema costs beside a step of the sample model, which is shorter than any other's. Then random schemas, half of them at
temperature 1: an answer that the limit of tokens did not cut must be valid JSON of its schema.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from benchmarks.bundles import export_by
from benchmarks.json_schemas import random_schema
from benchmarks.report import Report
from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.constraint import ConstrainedGuesser
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.guide import guide_of
from mllm_edge.runtime.decode.guided import Guides
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.trace import Trace
from mllm_edge.runtime.vlm import VLM

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_SAMPLE = _ROOT / "examples" / "sample_vlm" / "model"
_IMAGE = _ROOT / "examples" / "images" / "circles.png"
_QUESTION = "What is in the picture?"
_LONGEST = 600
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20, "maxLength": 40},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "shape": {"enum": ["circle", "square", "cross", "triangle"]},
        "colours": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 4},
    },
    "required": ["title", "count", "shape", "colours"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the sample model, exported with int4")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Answers guided by a JSON schema")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        bundle = options.bundle or export_by(_ROOT, _SAMPLE, Path(folder) / "sample")
        with VLM.load(bundle) as vlm:
            for temperature in (0.0, 1.0):
                row = _cost(vlm, temperature, True, options.rounds)
                report.row(row)
                report.at_most(f"time of a token at temperature {temperature:g}, over without", row["ratio"], 1.05)
                report.row(_cost(vlm, temperature, False, options.rounds))
            _validity(vlm, options.schemas, report)
    report.print()
    if options.json:
        report.write(options.json)


class _Along(Sampler):
    """Chooses a token, which takes its time, and says what the next of `tokens` is."""

    def __init__(self, params: SamplingParams, tokens: Sequence[int]):
        super().__init__(params)
        self._tokens = iter(tokens)

    def sample(self, logits: np.ndarray | TopLogits | None) -> int:
        super().sample(logits)
        return next(self._tokens)


def _cost(vlm: VLM, temperature: float, together: bool, rounds: int) -> dict[str, Any]:
    """Medians in µs of a token, and of the ratios of rounds, whose two sides follow each other. `together`: what is
    forced runs in one step."""
    prompt = vlm.encode(vlm.processor.process(_QUESTION, [_IMAGE]))
    guides, guide = Guides(vlm.tokenizer, vlm.spec.vocab_size), guide_of(_SCHEMA, None, None, None)
    assert guide is not None
    pairs: list[tuple[float, float]] = []
    counts: list[int] = []
    for seed in range(1 + rounds):
        params = SamplingParams(temperature=temperature, seed=seed)
        guided = guides.start(guide, vlm.stop_ids)
        guesser = ConstrainedGuesser(guided, None) if together else None
        tokens, seconds = _run(vlm, prompt, Sampler(params, (), None, guided), vlm.stop_ids, guesser)
        plain = _run(vlm, prompt, _Along(params, tokens), (), None, len(tokens))[1]
        pairs.append((seconds, plain))
        counts.append(len(tokens))
    pairs = pairs[1:]  # the first warms up
    return {
        "temperature": temperature,
        "forced tokens": "in one step" if together else "one by one",
        "tokens": statistics.median(counts),
        "guided, µs": 1e6 * statistics.median(guided for guided, _ in pairs),
        "without, µs": 1e6 * statistics.median(plain for _, plain in pairs),
        "ratio": statistics.median(guided / plain for guided, plain in pairs),
    }


def _run(
    vlm: VLM,
    prompt: Encoded,
    sampler: Sampler,
    stop_ids: Collection[int],
    guesser: ConstrainedGuesser | None,
    most: int = _LONGEST,
) -> tuple[list[int], float]:
    """The tokens, and the seconds of one behind the first."""
    vlm.decoder.start(prompt, most)
    tokens, times = [], []
    for token in generate(vlm.decoder, vlm.embed, prompt, sampler, stop_ids, most, Trace(), guesser):
        tokens.append(token)
        times.append(time.perf_counter())
    return tokens, (times[-1] - times[0]) / (len(times) - 1)


def _validity(vlm: VLM, count: int, report: Report) -> None:
    """Answers to random schemas: the share that was cut, and how many of the others are wrong."""
    cut = wrong = 0
    for seed in range(count):
        schema = random_schema(seed)
        result = vlm.generate(
            _QUESTION, [_IMAGE], schema=schema, max_new_tokens=_LONGEST, temperature=float(seed % 2), seed=seed
        )
        if result.finish_reason == "length":
            cut += 1
        elif not _is_valid(result.text, schema):
            wrong += 1
            print(f"schema {seed}: {result.text!r} is not of {json.dumps(schema)}")
    report.at_most(f"answers to {count} random schemas that are wrong", wrong, 0)
    report.at_most("share of answers that the limit of tokens cut", cut / max(1, count), 0.05)


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    main()
