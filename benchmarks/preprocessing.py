"""A 1080p frame's preprocessing beside its vision encoder, on the CPU, for every family.

python -m benchmarks.preprocessing [--only FAMILY …] [--json F] [--recipe R]

Preprocessing depends on a model's image sizes alone, which are the real ones here. The encoder has the real widths and
a few of the real layers, so its time is less than the real one's: where preprocessing takes less than that, it takes
less than the real encoder does, and nothing is extrapolated.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report
from benchmarks.towers import TOWERS, save

__all__ = ["main"]

_ROUNDS = 3
_QUESTION = "What is on the belt?"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TOWERS, default=list(TOWERS), metavar="FAMILY")
    parser.add_argument("--recipe", default="int4", help="whose encoder: int4 has one of 8 bits, the fastest")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(f"A frame of 1920 × 1080, {options.recipe}, medians of {_ROUNDS} by turns")
    if options.json:
        report.on_row = lambda: report.write(options.json)
    for family in options.only:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            found = _measured(family, Path(folder), options.recipe)
        tower = TOWERS[family]
        row = {"family": family, "sizes of": tower.model, "layers": f"{tower.here} of {tower.layers}", **found}
        report.row(row)
        report.at_most(f"{family}: preprocessing over few layers", found["ratio"], 1)
    report.print()
    if options.json:
        report.write(options.json)


def _measured(family: str, folder: Path, recipe: str) -> dict[str, Any]:
    """Milliseconds and megapixels of a frame: both parts by turns, the first round apart."""
    from mllm_edge.export.pipeline import export
    from mllm_edge.runtime.trace import Trace
    from mllm_edge.runtime.vlm import VLM

    save(family, folder / "checkpoint")
    export(str(folder / "checkpoint"), folder / "bundle", recipe_name=recipe, verify_mode="off")
    frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    seconds = list[tuple[float, float]]()
    with VLM.load(folder / "bundle", backend="cpu") as vlm:
        stages = {stage.component for stage in vlm.spec.stages if stage.component in vlm.bundle.manifest.components}
        for _ in range(1 + _ROUNDS):
            begin = time.perf_counter()
            prompt = vlm.processor.process(_QUESTION, frame)
            preprocessing, trace = time.perf_counter() - begin, Trace()
            vlm.image_features(prompt, trace)
            seconds.append((preprocessing, sum(trace.seconds(stage) for stage in stages)))
        assert prompt.pixel_values is not None
        pixels = prompt.pixel_values.size / vlm.spec.image.channels if vlm.spec.image is not None else 0
    before, encoder = np.median(np.array(seconds[1:]), axis=0)
    return {
        "megapixels": float(pixels / 1e6),
        "preprocessing ms": float(1e3 * before),
        "few layers ms": float(1e3 * encoder),
        "ratio": float(before / encoder),
    }


if __name__ == "__main__":
    main()
