"""Export at Qwen3-VL-2B's sizes, beside OpenVINO's exporter in an environment of its own: time and memory, by turns.

python -m benchmarks.peer_export [--rounds N] [--json F] [--folder DIR] [--cache DIR]

Both make 4-bit weights of the decoder out of the same random checkpoint. Of the models with sizes in
benchmarks.vlm_checkpoints up to 3 B that came with families of 2026 it is the one that optimum-intel knows, with
transformers 5.0; it knows no LLaVA-OneVision, DeepSeek-VL, BLIP-2 or FastVLM.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_openvino import environment, export_command
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import GEOMETRIES

__all__ = ["main"]

MODEL = "Qwen3-VL-2B"
NEEDED_BYTES = 16e9
MOST_TIME, MOST_MEMORY = 0.25, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (16 GB)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mllm-edge-benchmarks")
    options = parser.parse_args()
    peer = environment(options.cache)
    with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
        if shutil.disk_usage(folder).free < NEEDED_BYTES:
            raise SystemExit(f"{folder}: less than {NEEDED_BYTES / 1e9:.0f} GB free; name another place with --folder")
        rows = _measure(Path(folder), peer, options.rounds)
    report = Report(f"Export of {MODEL}'s sizes to 4 bits, medians of {options.rounds}", rows)
    ours, theirs = rows
    report.at_most("time, ours over the peer's", ours["seconds"] / theirs["seconds"], MOST_TIME)
    report.at_most("peak RSS, ours over the peer's", ours["peak RSS, GB"] / theirs["peak RSS, GB"], MOST_MEMORY)
    report.print()
    if options.json:
        report.write(options.json)


def _measure(folder: Path, peer: Path, rounds: int) -> list[dict[str, Any]]:
    checkpoint, out = folder / "checkpoint", folder / "out"
    GEOMETRIES[MODEL](checkpoint)
    own = [sys.executable, "-m", "mllm_edge", "export", checkpoint, out, "--recipe", "int4", "--target", "cpu"]
    commands: dict[str, list[Any]] = {
        "mllm-edge": [*own, "--verify", "off"],
        "optimum-cli export openvino": [*export_command(peer, checkpoint, out), "--disable-convert-tokenizer"],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    sizes = dict.fromkeys(commands, 0)
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(_timed(command))
            sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            shutil.rmtree(out)
    return [
        {
            "exporter": name,
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "peak RSS, GB": statistics.median(peak for _, peak in runs),
            "written, GB": sizes[name] / 1e9,
        }
        for name, runs in found.items()
    ]


def _timed(command: list[Any]) -> tuple[float, float]:
    """Seconds and GB of a command, which must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main()
