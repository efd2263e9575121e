"""Time and memory of exporting a model with the sizes of LLaVA-1.5-7B.

python -m benchmarks.export_memory [--json F] [--folder DIR]

The checkpoint is random and made on the spot: 14 GB in a temporary folder, and 4 GB of bundle beside it.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.llava_checkpoint import write_llava
from benchmarks.report import Report

__all__ = ["main"]

NEEDED_BYTES = 20e9
MOST_SECONDS, MOST_GB = 150, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
        if shutil.disk_usage(folder).free < NEEDED_BYTES:
            raise SystemExit(f"{folder}: less than {NEEDED_BYTES / 1e9:.0f} GB free; name another place with --folder")
        write_llava(Path(folder) / "checkpoint")
        row = _export(Path(folder) / "checkpoint", Path(folder) / "bundle")
    report = Report("Export of LLaVA-1.5-7B's sizes, int4 for the CPU", [row])
    report.at_most("wall seconds", row["wall seconds"], MOST_SECONDS)
    report.at_most("peak RSS, GB", row["peak RSS, GB"], MOST_GB)
    report.print()
    if options.json:
        report.write(options.json)


def _export(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    options = ["--recipe", "int4", "--target", "cpu", "--verify", "off"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mllm_edge", "export", str(checkpoint), str(bundle), *options])
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit("the export failed")
    # The only child, so the largest child.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall seconds": round(seconds, 1),
        "processor seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak RSS, GB": round(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 3),
        "checkpoint GB": round(_nbytes(checkpoint) / 1e9, 2),
        "bundle GB": round(_nbytes(bundle) / 1e9, 2),
    }


def _nbytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


if __name__ == "__main__":
    main()
