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
    reports: dict[str, Report] = {}

    def keep() -> None:
        """Write what there is, so that a run that is stopped loses nothing."""
        if options.json:
            whole = Report("Calibrated quantization")
            whole.rows = [{"part": name, **row} for name, report in reports.items() for row in report.rows]
            whole.checks = [check for report in reports.values() for check in report.checks]
            whole.write(options.json)

    with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
        for name in options.only:
            report = reports[name] = Report(f"Calibrated quantization: {name}", on_row=keep)
            PARTS[name](report, Path(folder), options.questions)
            report.print()
            keep()


if __name__ == "__main__":
    main()
