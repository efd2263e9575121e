"""Seconds until a bundle is loaded, and until a cold process has a first token, against another checkout of this
project, by turns.

python -m benchmarks.load_time --baseline DIR [--only load cold_start] [--rounds 15] [--json F]

`load`: random weights of SmolVLM-256M's sizes, from when the libraries are imported. `cold_start`: the sample model and
a picture, from when the process is started. Every one is in a process of its own, with the files in the page cache
and modules compiled. Each checkout loads the bundle that it exported itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.bundles import export_by
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LOAD = """
import sys, time, warnings
warnings.simplefilter("ignore")
import jinja2, numpy, onnxruntime, PIL.Image, tokenizers
import mllm_edge
from mllm_edge import VLM
assert mllm_edge.__file__.startswith(sys.argv[1]), mllm_edge.__file__
begin = time.perf_counter()
vlm = VLM.load(sys.argv[2])
print(time.perf_counter() - begin)
"""
# The clock has one zero for all processes of a machine.
FIRST_TOKEN = """
import sys, time
from mllm_edge import VLM
vlm = VLM.load(sys.argv[2])
next(iter(vlm.stream("What is in the picture?", images=[sys.argv[4]], max_new_tokens=8)))
print(time.perf_counter() - float(sys.argv[3]))
"""


def _smolvlm(folder: Path) -> Path:
    smolvlm_256m(folder)
    return folder


# What is exported, what a process does with it, and the most that it may take of the baseline's time.
CHECKS: dict[str, tuple[Callable[[Path], Path], str, float]] = {
    "load": (_smolvlm, LOAD, 1.05),
    "cold_start": (lambda folder: EXAMPLES / "sample_vlm" / "model", FIRST_TOKEN, 0.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").partition("\n\n")[0].split()))
    parser.add_argument("--baseline", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Load")
    checkouts = {"baseline": options.baseline.resolve(), "here": ROOT}
    for check in options.only:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as name:
            _check(check, checkouts, Path(name), options.rounds, report)
    report.print()
    if options.json:
        report.write(options.json)


def _check(check: str, checkouts: dict[str, Path], folder: Path, rounds: int, report: Report) -> None:
    made, code, most = CHECKS[check]
    model = made(folder / "model")
    sides = {side: (root, export_by(root, model, folder / side)) for side, root in checkouts.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, (checkout, path) in sides.items() if number % 2 else reversed(sides.items()):
            spent = _spent(code, checkout, path, folder / "compiled")
            if number:  # the first round brings the files into the page cache, and compiles
                seconds[side].append(spent)
    size = sum(p.stat().st_size for p in sides["here"][1].iterdir()) / 1e6
    for side, values in seconds.items():
        row = {"check": check, "side": side, "median ms": 1e3 * median(values), "least ms": 1e3 * min(values)}
        report.rows.append(row | {"processes": len(values), "MB": size})
    report.at_most(f"{check}, against the baseline", median(seconds["here"]) / median(seconds["baseline"]), most)


def _spent(code: str, checkout: Path, bundle: Path, compiled: Path) -> float:
    picture = EXAMPLES / "images" / "pair.png"
    began = time.perf_counter()
    command = [sys.executable, "-c", code, str(checkout), str(bundle.resolve()), str(began), str(picture)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(compiled)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # The current folder comes first where modules are looked for.
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
