"""Attention of vision encoders in 8-bit products beside ONNX Runtime's in float32: time by turns, error, memory.

python -m benchmarks.vision_attention [--threads N …] [--rounds 15] [--json F]

Random q and k; "even": all patches see each other alike. The error is the root mean square of the difference, relative.
Memory is the peak of a process of its own, above that of one which has loaded the graph.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.measure import in_process
from benchmarks.report import Report
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder, save_model
from mllm_edge.graph.datafile import DryFile
from mllm_edge.graph.int8_attention import quantize_attention
from mllm_edge.runtime.machine.cpu import peak_rss

__all__ = ["main"]

# Patches, heads, size of a head: CLIP-L/14-336, SigLIP-B/16-512, Qwen2-VL at 644 × 476 px, more of it.
_SIZES = ((576, 16, 64), (1024, 12, 64), (1564, 16, 80), (4096, 16, 80))
_FORMS = ("float32", "int8")
_SPEED = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Attention of vision encoders: float32 and int8")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        for sizes in _SIZES:
            files = [_write(Path(folder), form, *sizes) for form in _FORMS]
            peaks = [in_process(_peak, file, sizes).result / 1e6 for file in files]
            errors = {kind: _error(files, _arrays(sizes, spread)) for kind, spread in (("random", 1.0), ("even", 0.0))}
            for threads in options.threads:
                times = _by_turns(files, _arrays(sizes, 1.0), threads, options.rounds)
                ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
                row: dict[str, Any] = {"patches × heads × size": " × ".join(map(str, sizes)), "threads": threads}
                row |= {f"{form} ms": 1000 * min(found) for form, found in zip(_FORMS, times, strict=True)}
                row |= {"float32 / int8": ratio} | {f"error, {kind}": found for kind, found in errors.items()}
                row |= {f"{form} MB": peak for form, peak in zip(_FORMS, peaks, strict=True)}
                report.row(row)
                report.at_least(f"{sizes[0]} patches, {threads} threads: float32 over int8", ratio, _SPEED)
    report.print()
    if options.json:
        report.write(options.json)


def _write(folder: Path, form: str, patches: int, heads: int, size: int) -> Path:
    graph = GraphBuilder("attention", 20, DryFile(), contrib=True)
    shape = ("images", patches, heads * size)
    inputs = [graph.input(name, ir.DataType.FLOAT, shape) for name in "qkv"]
    y = graph.node("MultiHeadAttention", inputs, "heads", MICROSOFT, num_heads=heads, scale=size**-0.5)
    graph.output(y, "y", ir.DataType.FLOAT, shape)
    model, path = graph.model(), folder / f"{form}-{patches}.onnx"
    if form == "int8":
        quantize_attention(model.graph, DryFile())
    save_model(model, path)
    return path


def _arrays(sizes: tuple[int, int, int], spread: float) -> dict[str, np.ndarray]:
    """q, k and v; q `spread` out so far."""
    patches, heads, size = sizes
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, patches, heads * size), np.float32) for _ in range(3))
    return {"q": spread * q, "k": k, "v": v + np.float32(0.5)}


def _session(file: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _by_turns(files: list[Path], arrays: dict[str, np.ndarray], threads: int, rounds: int) -> list[list[float]]:
    """Seconds of each round, by file; the first round of all is not counted."""
    sessions = [_session(file, threads) for file in files]
    times: list[list[float]] = [[] for _ in files]
    for _ in range(rounds + 1):
        for session, found in zip(sessions, times, strict=True):
            begin = time.perf_counter()
            session.run(None, arrays)
            found.append(time.perf_counter() - begin)
    return [found[1:] for found in times]


def _error(files: list[Path], arrays: dict[str, np.ndarray]) -> float:
    expected, found = (_session(file, 1).run(None, arrays)[0] for file in files)
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def _peak(file: Path, sizes: tuple[int, int, int]) -> int:
    """Bytes that the peak grows by in a run."""
    session, arrays = _session(file, 1), _arrays(sizes, 1.0)
    before = peak_rss()
    session.run(None, arrays)
    return peak_rss() - before


if __name__ == "__main__":
    main()
