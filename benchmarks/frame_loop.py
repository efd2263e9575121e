"""A loop over frames: CPU time of a frame with default settings beside one thread's, and decode speed beside another
checkout's.

python -m benchmarks.frame_loop [--large] [--baseline DIR] [--frames 20] [--rounds 7] [--json F]

Each contender is a process of its own; they take turns, and each round begins with another one. Ratios are taken within
a round, the median counts; the spread is that of the middle half. A frame comes every 100 ms, or when the last one is
done. `--baseline`: the root of an older checkout.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" or TYPE_CHECKING:  # the loop's own processes have none
    from benchmarks.bundles import export_by
    from benchmarks.report import Report
    from benchmarks.served import Served
    from benchmarks.vlm_checkpoints import smolvlm_256m

__all__ = ["main", "serve"]

_ROOT = Path(__file__).parents[1]
_PERIOD = 0.1
_TOKENS = 24
MOST_CPU, LEAST_SPEED = 1.3, 0.98
DEFAULT, ONE, BASELINE = "default", "one thread", "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--large", action="store_true", help="random weights of SmolVLM-256M's sizes, one tile")
    parser.add_argument("--baseline", type=Path, metavar="DIR")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("A loop over frames")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        model = _ROOT / "examples" / "sample_vlm" / "model"
        if options.large:
            model = Path(folder) / "model"
            smolvlm_256m(model, longest_edge=512)
        bundle = export_by(_ROOT, model, Path(folder) / "bundle")
        contenders = {DEFAULT: Served(_ROOT, __file__, bundle, None), ONE: Served(_ROOT, __file__, bundle, 1)}
        if options.baseline:  # each checkout reads what it wrote itself
            older = export_by(options.baseline.resolve(), model, Path(folder) / "older")
            contenders[BASELINE] = Served(options.baseline, __file__, older, None)
        rounds = [_round(contenders, i, options.frames) for i in range(options.rounds)]
        for loop in contenders.values():
            loop.close()
    for name in contenders:
        medians = {figure: statistics.median(r[name][figure] for r in rounds) for figure in rounds[0][name]}
        report.rows.append({"setting": name, **medians})
    _check(report, "CPU time of a frame, default / one thread", rounds, "CPU ms", ONE, MOST_CPU)
    if options.baseline:
        _check(report, "decode tok/s, default / baseline", rounds, "tok/s", BASELINE, LEAST_SPEED)
    report.print()
    if options.json:
        report.write(options.json)


def serve(bundle: str, threads: int | None) -> None:
    """Answer each number of frames on standard input by their figures, as JSON; runs in any checkout."""
    from mllm_edge import VLM

    picture = str(_ROOT / "examples" / "images" / "pair.png")
    options: dict[str, Any] = {"images": [picture], "max_new_tokens": _TOKENS, "ignore_eos": True}
    with VLM.load(bundle, threads=threads) as vlm:
        for line in sys.stdin:
            vlm.generate("What is in the picture?", **options)
            begin, speeds, busy = os.times(), [], 0.0
            for _ in range(int(line)):
                start = time.perf_counter()
                metrics = vlm.generate("What is in the picture?", **options).metrics
                speeds.append(1 / statistics.median(metrics.token_seconds))
                taken = time.perf_counter() - start
                busy += taken
                time.sleep(max(0.0, _PERIOD - taken))
            end = os.times()
            cpu = (end.user + end.system - begin.user - begin.system) / int(line)
            figures = {"CPU ms": 1000 * cpu, "frame ms": 1000 * busy / int(line), "tok/s": statistics.median(speeds)}
            print(json.dumps(figures), flush=True)


def _round(contenders: "dict[str, Served]", i: int, frames: int) -> dict[str, dict[str, float]]:
    names = list(contenders)
    names = names[i % len(names) :] + names[: i % len(names)]
    return {name: contenders[name].ask(frames) for name in names}


def _check(report: "Report", name: str, rounds: Sequence[Any], figure: str, other: str, target: float) -> None:
    ratios = [r[DEFAULT][figure] / r[other][figure] for r in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    check = report.at_most if figure == "CPU ms" else report.at_least
    check(f"{name} (middle half {low:.3g} to {high:.3g})", middle, target)


if __name__ == "__main__":
    main()
