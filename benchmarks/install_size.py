"""Disk space of the runtime on a device, each way to install it in a bare environment that then answers a question.

python -m benchmarks.install_size [--json F]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from benchmarks.report import Report

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
LARGEST_MB = 150
QUESTION, IMAGE = "How many circles are there?", ROOT / "examples" / "images" / "circles.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Installed size")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as name:
        folder = Path(name)
        bundle, wheel = _bundle(folder), _wheel(folder)
        listed = ["--no-compile", "--no-deps", "-r", str(ROOT / "requirements" / "device-cpu.txt"), str(wheel)]
        ways = {
            "pip install mllm-edge[cpu]": [f"{wheel}[cpu]"],
            "pip install --no-compile mllm-edge[cpu]": ["--no-compile", f"{wheel}[cpu]"],
            "requirements/device-cpu.txt": listed,
        }
        for number, (way, arguments) in enumerate(ways.items()):
            report.rows.append(_measure(way, arguments, folder / f"env{number}", bundle))
    report.at_most("requirements/device-cpu.txt, MB", report.rows[-1]["MB"], LARGEST_MB)
    report.print()
    if options.json:
        report.write(options.json)


def _bundle(folder: Path) -> Path:
    from mllm_edge.export.pipeline import export

    export(str(ROOT / "examples" / "sample_vlm" / "model"), folder / "bundle")
    return folder / "bundle"


def _wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def _measure(way: str, arguments: list[str], environment: Path, bundle: Path) -> dict[str, Any]:
    """What the installation adds to a bare environment; nothing that running it may add."""
    venv.create(environment, with_pip=True)
    python, before = environment / "bin" / "python", _nbytes(environment)
    subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)
    added = _nbytes(environment) - before
    command: list[str | Path] = [environment / "bin" / "mllm-edge", "run", bundle, QUESTION, "--image", IMAGE]
    plain = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    plain.pop("PYTHONPATH", None)
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=plain, cwd=environment).stdout
    return {"way": way, "MB": round(added / 1e6, 1), "answer": answer.strip()}


def _nbytes(folder: Path) -> int:
    """Space on disk, in bytes."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*"))


if __name__ == "__main__":
    main()
