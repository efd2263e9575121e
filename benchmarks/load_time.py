"""Seconds until a bundle of a SmolVLM-256M's size is loaded, against another checkout of this project, by turns.

python -m benchmarks.load_time --baseline DIR [--rounds 15] [--json F]

Every load is in a process of its own, with the files in the page cache and the libraries imported. Each checkout loads
the bundle that it exported itself, of the same random weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.bundles import export_by
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.05
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--baseline", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Load")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as name:
        model = Path(name) / "model"
        smolvlm_256m(model)
        checkouts = {"baseline": options.baseline.resolve(), "here": ROOT}
        sides = {side: (root, export_by(root, model, Path(name) / side)) for side, root in checkouts.items()}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds + 1):
            for side, (checkout, path) in sides.items() if number % 2 else reversed(sides.items()):
                spent = _load(checkout, path)
                if number:  # the first round brings the files into the page cache
                    seconds[side].append(spent)
        size = sum(p.stat().st_size for p in sides["here"][1].iterdir()) / 1e6
    for side, values in seconds.items():
        row = {"side": side, "median ms": 1e3 * median(values), "least ms": 1e3 * min(values), "loads": len(values)}
        report.rows.append(row | {"MB": size})
    report.at_most("load, against the baseline", median(seconds["here"]) / median(seconds["baseline"]), MOST)
    report.print()
    if options.json:
        report.write(options.json)


def _load(checkout: Path, bundle: Path) -> float:
    command = [sys.executable, "-c", LOAD, str(checkout), str(bundle.resolve())]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    # The current folder comes first where modules are looked for.
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
