"""Export to int4 and an answer about a 1080p picture, at the sizes of real models, with random weights.

python -m benchmarks.real_sizes [--only NAME …] [--json F] [--folder DIR]
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import in_process
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import GEOMETRIES
from mllm_edge.runtime.trace import STAGES

__all__ = ["main"]

_MOST_GB = 24
_TOKENS, _ROUNDS = 32, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (8 GB)")
    options = parser.parse_args()
    report = Report("Real sizes, int4, a picture of 1920 × 1080, medians of three")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
            row = _measure(name, Path(folder))
        report.rows.append(row)
        report.at_most(f"{name}: peak GB", max(row["export GB"], row["run GB"]), _MOST_GB)
    report.print()
    if options.json:
        report.write(options.json)


def _measure(name: str, folder: Path) -> dict[str, Any]:
    GEOMETRIES[name](folder / "checkpoint")
    exported = in_process(_export, folder / "checkpoint", folder / "bundle")
    shutil.rmtree(folder / "checkpoint")
    run = in_process(_run, folder / "bundle")
    return {
        "model": name,
        "export s": exported.seconds,
        "export GB": exported.peak,
        "bundle GB": exported.result / 1e9,
        "run GB": run.peak,
        **run.result,
    }


def _export(checkpoint: Path, bundle: Path) -> int:
    from mllm_edge.export.pipeline import export
    from tests.timm_reference import stand_in_for_timm

    stand_in_for_timm()  # FastVLM's tower and its like, where timm is not installed
    return export(str(checkpoint), bundle, recipe_name="int4", verify_mode="off").nbytes


def _run(bundle: Path) -> dict[str, float]:
    """Medians over calls, the first one apart."""
    from mllm_edge.runtime.vlm import VLM

    picture = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    with VLM.load(bundle) as vlm:
        vlm.generate("Hello.", max_new_tokens=2, ignore_eos=True)
        calls = [
            vlm.generate("What is on the belt?", [picture], max_new_tokens=_TOKENS, ignore_eos=True).metrics
            for _ in range(_ROUNDS)
        ]

    def median(values: list[float]) -> float:
        return float(np.median(values))

    return {
        "prompt tokens": calls[0].prompt_tokens,
        "vision s": median([sum(s for n, s in m.stages.items() if n not in STAGES) for m in calls]),
        "prefill s": median([m.stages["prefill"] for m in calls]),
        "TTFT s": median([m.ttft for m in calls]),
        "tok/s": 1 / median([float(np.median(m.token_seconds)) for m in calls]),
    }


if __name__ == "__main__":
    main()
