"""This checkout beside an earlier one: decode, prefill, time to the first token, export time and peak RSS.

python -m benchmarks.earlier_build --baseline DIR [--geometry SmolVLM-256M] [--rounds 7] [--exports 7] [--json F]

The two take turns, and each round begins with the other one. Ratios are taken within a round, the median counts; the
spread is that of the middle half. Weights are random; the question has one picture. `--baseline`: the root of an older
checkout; each reads what it wrote itself.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" or TYPE_CHECKING:  # the measured processes have none
    from benchmarks.bundles import export_by
    from benchmarks.report import Report
    from benchmarks.served import Served
    from benchmarks.vlm_checkpoints import GEOMETRIES

__all__ = ["main", "serve"]

_ROOT = Path(__file__).parents[1]
_TOKENS = 24
_SIDE = 448  # px
MOST = 1.05
THIS, BASELINE = "this", "baseline"
_Rounds = Sequence[Mapping[str, Mapping[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--baseline", type=Path, metavar="DIR", required=True)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="SmolVLM-256M")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exports", type=int, default=7, help="rounds of exports; one is needed for the bundles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(f"{options.geometry} at {options.recipe}: this build beside an earlier one")
    roots = {THIS: _ROOT, BASELINE: options.baseline.resolve()}
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        model, bundles = Path(folder) / "model", {name: Path(folder) / name for name in roots}
        GEOMETRIES[options.geometry](model)

        def exported(name: str) -> dict[str, float]:
            begin = time.perf_counter()
            more = ["--force"] if bundles[name].exists() else []
            export_by(roots[name], model, bundles[name], options.recipe, more)
            return {"export s": time.perf_counter() - begin}

        exports = _by_turns(exported, options.exports)
        served = {name: Served(root, __file__, bundles[name]) for name, root in roots.items()}
        answers = _by_turns(lambda name: served[name].ask(_TOKENS), options.rounds)
        for process in served.values():
            process.close()
    for name in roots:
        medians = {
            figure: statistics.median(r[name][figure] for r in rounds)
            for rounds in (exports, answers)
            for figure in rounds[0][name]
        }
        report.row({"build": name, **medians})
    for rounds in (exports, answers):
        for figure in rounds[0][THIS]:
            ratios = [r[THIS][figure] / r[BASELINE][figure] for r in rounds]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            report.at_most(f"{figure}, this / baseline (middle half {low:.3g} to {high:.3g})", middle, MOST)
    report.print()
    if options.json:
        report.write(options.json)


def serve(bundle: str) -> None:
    """Answer each number of tokens on standard input by the figures of an answer with as many, as JSON; runs in any
    checkout."""
    import numpy as np

    from mllm_edge import VLM

    picture = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    options: dict[str, Any] = {"images": [picture], "ignore_eos": True}
    with VLM.load(bundle, backend="cpu") as vlm:
        vlm.generate("What is in the picture?", max_new_tokens=4, **options)
        for line in sys.stdin:
            metrics = vlm.generate("What is in the picture?", max_new_tokens=int(line), **options).metrics
            figures = {
                "decode ms": 1000 * statistics.median(metrics.token_seconds),
                "prefill ms": 1000 * metrics.as_dict()["prefill"],  # type: ignore[operator]
                "TTFT ms": 1000 * metrics.ttft,
                "peak GB": _peak_bytes() / 1e9,
            }
            print(json.dumps(figures), flush=True)


def _peak_bytes() -> int:
    """Of this process; what getrusage tells may be the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _by_turns(measure: Callable[[str], dict[str, float]], rounds: int) -> _Rounds:
    names = [THIS, BASELINE]
    return [{name: measure(name) for name in (names if i % 2 else reversed(names))} for i in range(rounds)]


if __name__ == "__main__":
    main()
