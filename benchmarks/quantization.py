"""What calibrated quantization costs and saves: on matrices, on the sample model, at real sizes.

python -m benchmarks.quantization [--only PART …] [--questions N] [--json F] [--folder DIR]
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import quantization_methods, quantization_sample, quantization_sizes
from benchmarks.report import Report

__all__ = ["main"]

Part = Callable[[Report, Path, int], None]
PARTS: Mapping[str, Part] = {
    "methods": quantization_methods.add,
    "sample": quantization_sample.add,
    "text_only": quantization_sample.add_text_only,
    "vision": quantization_sizes.add_vision,
    "cost": quantization_sizes.add_cost,
    "large": quantization_sizes.add_large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--questions", type=int, default=2000, help="of each set, for the sample model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (12 GB)")
    options = parser.parse_args()
    checks = Report("Calibrated quantization: checks")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
        for name in options.only:
            report = Report(f"Calibrated quantization: {name}")
            PARTS[name](report, Path(folder), options.questions)
            report.print()
            checks.rows += [{"part": name, **row} for row in report.rows]
            checks.checks += report.checks
    if options.json:
        checks.write(options.json)


if __name__ == "__main__":
    main()
