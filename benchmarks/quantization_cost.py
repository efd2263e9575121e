"""An int4 calibration at SmolVLM-256M's sizes beside another checkout's: time, CPU time and peak RSS.

python -m benchmarks.quantization_cost --baseline DIR [--text] [--samples 128] [--rounds 3] [--threads N] [--json F]

All of it counts: recording, statistics, methods, writing, proof. Weights are random, and all layers of the decoder keep
four bits; `--text`: questions without pictures and answers, for the decoder alone. Each calibration is a process of its
own; they take turns, and each round begins with the other one. Ratios are taken within a round, the median counts.
`--baseline`: the root of an older checkout.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # the calibrations' own processes have none
    from benchmarks.bundles import export_by
    from benchmarks.report import Report
    from benchmarks.vlm_checkpoints import smolvlm_256m

__all__ = ["main", "pictures", "serve"]

_ROOT = Path(__file__).parents[1]
_HELD_BACK = 8
MOST, MOST_GB = 0.7, 2.4
OWN, BASELINE = "this", "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--baseline", type=Path, metavar="DIR", required=True)
    parser.add_argument("--text", action="store_true", help="questions alone, answered by the model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: as many as there are physical cores")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("The cost of a calibration")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        model = Path(folder) / "model"
        smolvlm_256m(model, longest_edge=512)
        roots = {OWN: _ROOT, BASELINE: options.baseline.resolve()}
        # Each checkout reads what it wrote itself.
        bundles = {name: export_by(root, model, Path(folder) / name, recipe="fp16") for name, root in roots.items()}
        rounds = []
        for i in range(options.rounds):
            names = list(roots) if i % 2 else list(reversed(roots))
            out = Path(folder) / "out"
            figures = {
                n: _run(roots[n], bundles[n], out, options.samples, options.text, options.threads) for n in names
            }
            rounds.append(figures)
            for name in names:
                report.row({"checkout": name, "samples": options.samples, **figures[name]})
    for figure in ("seconds", "CPU seconds"):
        ratio = statistics.median(figures[OWN][figure] / figures[BASELINE][figure] for figures in rounds)
        report.at_most(f"{figure}, this / baseline", ratio, MOST)
    report.at_most("peak GB", max(figures[OWN]["peak GB"] for figures in rounds), MOST_GB)
    report.print()
    if options.json:
        report.write(options.json)


def serve(bundle: str, out: str, samples: int, text: bool, threads: int | None) -> None:
    """Calibrate, and print what it took as JSON; runs in any checkout."""
    import inspect
    from dataclasses import replace

    from mllm_edge.calibration.recipes import CALIBRATED, RECIPES
    from mllm_edge.export.quantize import quantize

    recipe: Any = CALIBRATED["int4"]
    if hasattr(recipe, "more_bits_above"):
        recipe = replace(recipe, more_bits_above=None)
    if text:
        recipe = replace(recipe, vision=RECIPES["fp16"].vision, connector=RECIPES["fp16"].connector)
    newer = {"allow_loss": True, "builtin": False}
    known = inspect.signature(quantize).parameters
    arguments: dict[str, Any] = {name: value for name, value in newer.items() if name in known}
    data = _questions(samples + _HELD_BACK) if text else pictures(samples + _HELD_BACK)
    begin, before = time.perf_counter(), os.times()
    report = quantize(bundle, out, recipe=recipe, data=data, held_back=_HELD_BACK, threads=threads, **arguments)
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    figures = {"seconds": time.perf_counter() - begin, "CPU seconds": cpu, "peak GB": _peak_bytes() / 1e9}
    figures |= {f"{name} dB": found.sqnr for name, found in report.proof.components.items()}
    print(json.dumps(figures | {"KL": report.proof.kl}))


def _peak_bytes() -> int:
    """Of this process; what getrusage tells may be the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def pictures(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Smooth pictures with noise, of one tile, with questions and answers."""
    from PIL import Image

    items = []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(picture + random.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        items.append({"images": [noisy], "prompt": f"What is this? {i}", "answer": "a thing on a belt"})
    return items


def _questions(count: int) -> list[dict[str, Any]]:
    """Of unequal lengths; there are no merges in the vocabulary: a token is a letter."""
    return [{"prompt": f"Tell me what to do in case {i}, " + "please, " * (i % 5) + "now."} for i in range(count)]


def _run(root: Path, bundle: Path, out: Path, samples: int, text: bool, threads: int | None) -> dict[str, float]:
    """The figures of a calibration by the code in `root`."""
    arguments = f"{str(bundle)!r}, {str(out)!r}, {samples!r}, {text!r}, {threads!r}"
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('quantization_cost', {str(Path(__file__))!r}); "
        f"m = u.module_from_spec(s); s.loader.exec_module(m); m.serve({arguments})"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    # The current folder comes first where modules are looked for.
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{root}: the calibration failed\n{done.stderr}")
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
