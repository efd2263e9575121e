"""What checking guesses in one step is worth on the CPU, by how many come true, and prompt lookup on the sample model.

python -m benchmarks.speculation [--geometry S M] [--rounds N] [--json F]

Random weights by the int4 recipe. A guesser that knows the answer tells it, each token spoilt with a probability; it
runs through the shipping loop, in one process, its settings by turns within a round, a run without guesses in each.
The answer is held to while speeds are measured: between random weights' tokens rounding decides now and then, and it
differs with the width of a step. That no token changes is checked in float32, of S alone: M would take 6 GB.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import own_decoder
from benchmarks.checkpoints import GEOMETRIES, Geometry, write_checkpoint
from benchmarks.measure import in_process
from benchmarks.report import Report
from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.machine.cpu import physical_cores
from mllm_edge.runtime.trace import Trace
from mllm_edge.runtime.vlm import VLM

__all__ = ["Held", "Known", "Ran", "main", "ratios"]

ACCEPTANCE = (0.0, 0.25, 0.5, 0.75, 1.0)
GUESSED = (1, 2, 4, 8)
PROMPT, TOKENS = 64, 49
_EXAMPLE = Path(__file__).parents[1] / "examples" / "sample_vlm"
_QUESTIONS = 60
_CHECKED = "S"


class Known:
    """Guesses the next `most` tokens of `answer`, each right with the probability `acceptance`."""

    def __init__(self, answer: Sequence[int], most: int, acceptance: float, vocabulary: int):
        self._answer, self._most, self._acceptance, self._vocabulary = answer, most, acceptance, vocabulary
        self._random, self._produced = np.random.default_rng(0), 0

    def guess(self, count: int) -> list[int]:
        truth = self._answer[self._produced : self._produced + min(count, self._most)]
        right = self._random.random(len(truth)) < self._acceptance
        return [t if ok else (t + 1) % self._vocabulary for t, ok in zip(truth, right, strict=True)]

    def observe(self, token: int) -> None:
        self._produced += 1


class Held(Sampler):
    """Chooses the likeliest token, which takes its time, and says that of `answer`."""

    def __init__(self, answer: Sequence[int]):
        super().__init__(SamplingParams())
        self._left = iter(answer)

    def sample(self, logits: Any) -> int:
        super().sample(logits)
        return next(self._left)


@dataclass(frozen=True)
class Ran:
    """An answer's ids, tokens a second behind the first, and what was guessed and came true."""

    ids: tuple[int, ...]
    speed: float
    guessed: int
    accepted: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["S"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Speculation: tok/s over those without, by the share of guesses that come true")
    for name in options.geometry:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            in_process(_build, GEOMETRIES[name], Path(folder))
            rounds = in_process(_measure, GEOMETRIES[name], Path(folder), options.rounds).result
            _add(report, name, rounds)
            if name == _CHECKED:
                same = in_process(_same, GEOMETRIES[name], Path(folder)).result
                report.at_least(f"{name}: answers in float32 that are the same", same, 1.0)
    report.print()
    sample = Report("Prompt lookup on the sample model's hard questions", in_process(_sample).result)
    sample.at_least("sample model: answers that are the same", _least(sample.rows), 1.0)
    sample.print()
    if options.json:
        Report("", [*report.rows, *sample.rows], [*report.checks, *sample.checks]).write(options.json)


def ratios(rounds: Sequence[dict[tuple[int, float], Ran]]) -> dict[tuple[int, float], float]:
    """Of each (guessed, acceptance), the median over rounds of its speed over that of no guesses, (0, 0)."""
    settings = [setting for setting in rounds[0] if setting[0]]
    return {s: statistics.median(ran[s].speed / ran[0, 0.0].speed for ran in rounds) for s in settings}


def _build(geometry: Geometry, folder: Path) -> None:
    write_checkpoint(geometry, folder / "checkpoint")
    for recipe in ("int4", "fp32") if geometry.name == _CHECKED else ("int4",):
        own_decoder.build(geometry, folder / "checkpoint", RECIPES[recipe], folder / recipe)


def _same(geometry: Geometry, folder: Path) -> float:
    """The share of float32 answers with guesses, some of them right, that are the one without."""
    decoder, embed = own_decoder.open_decoder(folder / "fp32", physical_cores())
    ids, answers = _prompt(geometry), list[list[int]]()
    for most in (0, *GUESSED):
        decoder.reset(PROMPT + TOKENS)
        guesser = Known(answers[0], most, 0.5, geometry.vocab_size) if most else None
        setting = (Sampler(SamplingParams()), (), TOKENS, Trace())
        answers.append(list(generate(decoder, embed, Encoded(embed(ids)), *setting, guesser=guesser)))
    return float(np.mean([answer == answers[0] for answer in answers]))


def _prompt(geometry: Geometry) -> np.ndarray:
    return np.random.default_rng(0).integers(3, geometry.vocab_size, PROMPT)


def _measure(geometry: Geometry, folder: Path, rounds: int) -> list[dict[tuple[int, float], Ran]]:
    """Every setting's run in each round, begun by another one each time; an unmeasured run comes first."""
    decoder, embed = own_decoder.open_decoder(folder / "int4", physical_cores())
    ids = _prompt(geometry)
    settings = [(0, 0.0), *((most, rate) for most in GUESSED for rate in ACCEPTANCE)]

    def run(guesser: Known | None, sampler: Sampler) -> Ran:
        decoder.reset(PROMPT + TOKENS)
        trace, times, answer = Trace(), [], []
        for token in generate(decoder, embed, Encoded(embed(ids)), sampler, (), TOKENS, trace, guesser=guesser):
            times.append(time.perf_counter())
            answer.append(token)
        speed = (TOKENS - 1) / (times[-1] - times[0])
        return Ran(tuple(answer), speed, trace.counts["guessed"], trace.counts["accepted"])

    known, found = run(None, Sampler(SamplingParams())).ids, []
    run(Known(known, max(GUESSED), 1.0, geometry.vocab_size), Held(known))
    for number in range(rounds):
        first = number % len(settings)
        turns = [*settings[first:], *settings[:first]]
        found.append(
            {
                (most, rate): run(Known(known, most, rate, geometry.vocab_size) if most else None, Held(known))
                for most, rate in turns
            }
        )
    return found


def _add(report: Report, geometry: str, rounds: Sequence[dict[tuple[int, float], Ran]]) -> None:
    plain = statistics.median(ran[0, 0.0].speed for ran in rounds)
    found = ratios(rounds)
    for most in GUESSED:
        row: dict[str, Any] = {"geometry": geometry, "guessed at once": most, "tok/s without": plain}
        report.rows.append(row | {f"{rate:.0%} right": found[most, rate] for rate in ACCEPTANCE})
    # Every guess comes true, or none: the guesser is checked as it says.
    extremes = [(ran[most, 1.0], ran[most, 0.0]) for ran in rounds for most in GUESSED]
    good = all(right.accepted == right.guessed and not wrong.accepted for right, wrong in extremes)
    report.at_least(f"{geometry}: guesses counted as they were made", float(good), 1.0)


def _sample() -> list[dict[str, Any]]:
    """Tokens a second and calls a second with prompt lookup over those without, the same questions by turns."""
    from mllm_edge.export.pipeline import export

    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        export(str(_EXAMPLE / "model"), Path(folder) / "bundle", recipe_name="int4", verify_mode="off")
        with VLM.load(Path(folder) / "bundle") as vlm:
            asked = list(_questions())
            calls: dict[int, list[Any]] = {n: [] for n in (0, *GUESSED)}
            for question, image in [asked[0], *asked]:
                for n, found in calls.items():
                    result = vlm.generate(question, [image], speculation=n)
                    found.append((result.token_ids, result.metrics))
    return [_sample_row(n, calls[n][1:], calls[0][1:]) for n in GUESSED]


def _questions() -> Iterator[tuple[str, Any]]:
    sys.path.insert(0, str(_EXAMPLE))
    import questions
    import scenes

    for _, scene, question in questions.held_out("hard", _QUESTIONS):
        yield question.question, scenes.render(scene)


def _sample_row(most: int, calls: Sequence[Any], plain: Sequence[Any]) -> dict[str, Any]:
    tokens = sum(m.new_tokens for _, m in calls)
    guessed, accepted = sum(m.guessed for _, m in calls), sum(m.accepted for _, m in calls)
    return {
        "guessed at once": most,
        "questions": len(calls),
        "tokens an answer": tokens / len(calls),
        "guesses": guessed,
        "accepted": accepted / guessed if guessed else None,
        "tok/s over those without": _median_ratio(plain, calls, ("decode", "sample")),
        "calls/s over those without": _median_ratio(plain, calls, ("total",)),
        "same": float(np.mean([a[0] == b[0] for a, b in zip(calls, plain, strict=True)])),
    }


def _median_ratio(plain: Sequence[Any], calls: Sequence[Any], stages: Sequence[str]) -> float:
    """Of the seconds of `stages` without and with guesses, over questions: one call that stalls tells nothing."""
    seconds = [[sum(getattr(m, stage) for stage in stages) for _, m in side] for side in (plain, calls)]
    return statistics.median(a / b for a, b in zip(*seconds, strict=True) if b)


def _least(rows: Sequence[dict[str, Any]]) -> float:
    return min(row["same"] for row in rows)


if __name__ == "__main__":
    main()
