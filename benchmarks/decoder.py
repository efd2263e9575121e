"""Decode and prefill speed and peak memory of real decoder geometries on the CPU, beside a peer's.

python -m benchmarks.decoder [--geometry S M] [--peer onnxruntime-genai] [--rounds N] [--environments DIR] [--json F]

Random weights from one checkpoint; every contender is a process of its own, a new one in every round: a process draws
its luck with the placement of its memory once. Within a round contenders take turns, so that a machine that becomes
slower does so for all of them, and each round begins with another one. Ratios are taken within a round. Needs Linux.

The peer's builder makes graphs that project every row of a prompt onto the vocabulary, unless it is told to
(`prune_lm_head`): targets are for its graphs as they come, and the others are measured as well.
"""

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import own_decoder, peer_genai
from benchmarks.checkpoints import GEOMETRIES, Geometry, write_checkpoint
from benchmarks.report import Report
from benchmarks.worker import WARM_STEPS, Memory, Worker
from mllm_edge.calibration.recipes import CALIBRATED, RECIPES, Recipe
from mllm_edge.graph.precision import Precision
from mllm_edge.runtime.machine.cpu import physical_cores

__all__ = ["Contender", "Result", "main", "median_of_ratios"]

# The peer's builder knows one block size for all weights: the largest that divides every row.
BLOCK = {"S": 64, "M": 128}
DECODE_CONTEXTS = (64, 1024)
PREFILL = 512
STEPS = 32
CAPACITY = max(DECODE_CONTEXTS) + WARM_STEPS + STEPS + 4
TARGETS = {"decode at context 64": 0.95, "decode at context 1024": 1.0, f"prefill {PREFILL}": 1.15}
# Two programs that compute different things are not compared. With unrounded weights the correlation is 1; 4-bit
# rounding alone brings logits of random weights down to 0.75 (S) and below 0.5 (M, whose rows are longer).
LEAST_CORRELATION = 0.2
LEAST_BESIDE_PRUNED = 0.95
OURS, SHIPPING, PRUNED = "ours", "ours, int4 recipe", f"{peer_genai.NAME}, last row alone"
# The decoder of the calibrated int8 recipe; what calibration finds changes no node.
EIGHT, INT8 = "ours, int8 in 8 by 8 bits", replace(CALIBRATED["int8"].decoder, method="rtn")
LEAST_PREFILL_OF_INT8 = 1.4
_CACHE = Path.home() / ".cache" / "mllm-edge-benchmarks"


@dataclass(frozen=True)
class Contender:
    """The command of a worker and how its weights are held; `setting` is for people."""

    name: str
    setting: str
    command: Sequence[str | Path]


@dataclass(frozen=True)
class Result:
    """One contender's tok/s of every round, by figure; memory at each round's end; logits [V] behind one prompt."""

    rounds: Mapping[str, Sequence[float]]
    memory: Sequence[Memory]
    logits: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["S"])
    parser.add_argument("--peer", choices=[peer_genai.NAME])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments", type=Path, default=_CACHE, help="where the peer's environment is kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Stopped workers would outlive a plain termination: leave through the context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    python = peer_genai.environment(options.environments) if options.peer else None
    report = Report("Decoder on the CPU, tok/s")
    for name in options.geometry:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            _compare(GEOMETRIES[name], Path(folder), python, options.rounds, report)
    report.print()
    if options.json:
        report.write(options.json)


def median_of_ratios(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median over rounds of ours / peer."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def _compare(geometry: Geometry, folder: Path, python: Path | None, rounds: int, report: Report) -> None:
    checkpoint = folder / "checkpoint"
    write_checkpoint(geometry, checkpoint)
    contenders = list(_built(geometry, checkpoint, folder, python))
    results = _measure(geometry, contenders, rounds, folder)
    report.rows += [row for c in contenders for row in _rows(geometry.name, c, results[c.name])]
    figure = f"prefill {PREFILL}"
    ratio = median_of_ratios(results[EIGHT].rounds[figure], results[SHIPPING].rounds[figure])
    report.at_least(f"{geometry.name} {figure}, int8 / int4", ratio, LEAST_PREFILL_OF_INT8)
    if python is not None:
        _check(report, geometry.name, results)


def _built(geometry: Geometry, checkpoint: Path, folder: Path, python: Path | None) -> Iterator[Contender]:
    """In the order in which they take turns."""
    threads, block = physical_cores(), BLOCK[geometry.name]
    setting = f"4-bit block {block}, head 8-bit block {block}"
    if python is not None:
        own_decoder.build(geometry, checkpoint, _equal_recipe(block), folder / "equal")
        yield Contender(OURS, setting, own_decoder.command(folder / "equal", threads, CAPACITY))
        peer_genai.write_tokenizer(geometry, checkpoint)
        for name, prune in ((peer_genai.NAME, False), (PRUNED, True)):
            place = folder / f"peer-{prune}"
            peer_genai.build(python, checkpoint, place, block, prune)
            yield Contender(name, setting, peer_genai.command(python, place, threads, CAPACITY))
    own_decoder.build(geometry, checkpoint, RECIPES["int4"], folder / "int4")
    yield Contender(SHIPPING, "int4 recipe", own_decoder.command(folder / "int4", threads, CAPACITY))
    own_decoder.build(geometry, checkpoint, replace(RECIPES["int8"], decoder=INT8), folder / "int8")
    yield Contender(EIGHT, "int8, a scale for each token", own_decoder.command(folder / "int8", threads, CAPACITY))


def _equal_recipe(block: int) -> Recipe:
    """What the peer's builder can make as well."""
    body, head = Precision("blocks", 4, block), Precision("blocks", 8, block)
    return Recipe(f"int4 block {block}", body, body, body, head)


def _measure(geometry: Geometry, contenders: Sequence[Contender], rounds: int, folder: Path) -> dict[str, Result]:
    random = np.random.default_rng(0)
    lengths = {f"decode at context {n}": n for n in DECODE_CONTEXTS} | {f"prefill {PREFILL}": PREFILL}
    prompts = {figure: random.integers(3, geometry.vocab_size, n).tolist() for figure, n in lengths.items()}
    measured = [_round(_beginning_with(contenders, i), prompts, folder) for i in range(rounds)]
    return {
        c.name: Result(
            {figure: [speeds[c.name][figure] for speeds, _, _ in measured] for figure in prompts},
            [memory[c.name] for _, memory, _ in measured],
            measured[0][2][c.name],
        )
        for c in contenders
    }


def _beginning_with(contenders: Sequence[Contender], i: int) -> Sequence[Contender]:
    first = i % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def _round(
    contenders: Sequence[Contender], prompts: Mapping[str, Sequence[int]], folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, Memory], dict[str, np.ndarray]]:
    """Speeds, memory and logits of new workers, by contender; the logits warm them up."""
    speeds: dict[str, dict[str, float]] = {c.name: {} for c in contenders}
    with contextlib.ExitStack() as stack:
        workers = {
            c.name: stack.enter_context(Worker(c.name, c.command, folder / f"{i}.log"))
            for i, c in enumerate(contenders)
        }
        logits = {name: np.array(worker.logits(prompts[f"prefill {PREFILL}"])) for name, worker in workers.items()}
        for figure, ids in prompts.items():
            for name, worker in workers.items():
                speeds[name][figure] = _speed(worker, figure, ids)
        return speeds, {name: worker.memory() for name, worker in workers.items()}, logits


def _speed(worker: Worker, figure: str, ids: Sequence[int]) -> float:
    """tok/s."""
    if figure.startswith("prefill"):
        return len(ids) / worker.measure(ids, 0).prefill
    return 1 / worker.measure(ids, STEPS).step


def _rows(geometry: str, contender: Contender, result: Result) -> list[dict[str, Any]]:
    """One row per round and one of medians, which has the memory too."""
    about = {"geometry": geometry, "engine": contender.name, "weights": contender.setting}
    rounds = len(next(iter(result.rounds.values())))
    rows: list[dict[str, Any]] = [
        {**about, "round": i + 1, **{figure: speeds[i] for figure, speeds in result.rounds.items()}}
        for i in range(rounds)
    ]
    medians = {figure: statistics.median(speeds) for figure, speeds in result.rounds.items()}
    memory = {
        "peak MB": round(statistics.median(m.peak for m in result.memory) / 1e6),
        "anonymous MB": round(statistics.median(m.anonymous for m in result.memory) / 1e6),
    }
    return [*({**row, **dict.fromkeys(memory)} for row in rows), {**about, "round": "median", **medians, **memory}]


def _check(report: Report, geometry: str, results: Mapping[str, Result]) -> None:
    ours, peer, pruned = results[OURS], results[peer_genai.NAME], results[PRUNED]
    for figure, target in TARGETS.items():
        ratio = median_of_ratios(ours.rounds[figure], peer.rounds[figure])
        report.at_least(f"{geometry} {figure}, ours / {peer_genai.NAME}", ratio, target)
        ratio = median_of_ratios(ours.rounds[figure], pruned.rounds[figure])
        report.at_least(f"{geometry} {figure}, ours / {PRUNED}", ratio, LEAST_BESIDE_PRUNED)
    for name, other in ((peer_genai.NAME, peer), (PRUNED, pruned)):
        peaks = [[m.peak for m in result.memory] for result in (ours, other)]
        report.at_most(f"{geometry} peak RSS, ours / {name}", median_of_ratios(*peaks), 1.0)
    correlation = float(np.corrcoef(ours.logits, peer.logits)[0, 1])
    report.at_least(f"{geometry} logits, correlation with {peer_genai.NAME}", correlation, LEAST_CORRELATION)


if __name__ == "__main__":
    main()
