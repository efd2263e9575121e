"""What the host does for one decode step on TensorRT: a decoder of 30 layers over a GPU on which nothing is executed.

python -m benchmarks.tensorrt_steps [--baseline DIR] [--rounds 9] [--json F]

TensorRT and CUDA are the tests' stand-ins, so what is left is this package's own time: the cache advances, inputs are
written, everything is enqueued. `--baseline`: the root of an older checkout; the two take turns, and each reads the
bundle that it wrote itself. Counts are of 256 steps, of one token or of 1 to 16 guessed ones. Needs the tests' tiny
checkpoints: run it in a checkout.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" or TYPE_CHECKING:  # the measured processes have none
    from benchmarks.report import Report
    from benchmarks.served import Served

__all__ = ["main", "serve"]

_ROOT = Path(__file__).parents[1]
_STEPS, _PROMPT = 256, 40
_MOST_MS = {"tensorrt": 0.05, "tensorrt-10.3": 0.15}
_MOST_COUNT = 8
_TEXT = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--baseline", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    roots = {"this": _ROOT} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
    report = Report(f"{_TEXT['num_hidden_layers']} layers: the host's part of a decode step on TensorRT")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        served = {name: Served(root, __file__, Path(folder) / name, _ROOT) for name, root in roots.items()}
        for target, most in _MOST_MS.items():
            rounds = []
            for i in range(options.rounds):
                names = list(roots) if i % 2 else list(reversed(roots))
                rounds.append({name: served[name].ask(target) for name in names})
            for name in roots:
                figures = {figure: statistics.median(r[name][figure] for r in rounds) for figure in rounds[0][name]}
                report.row({"build": name, "target": target, **figures})
            mine = report.rows[-len(roots)]
            report.at_most(f"{target}: ms a step", mine["step ms"], most)
            for figure in (figure for figure in mine if figure.startswith(("allocated", "recorded"))):
                report.at_most(f"{target}: {figure}", mine[figure], _MOST_COUNT)
        for process in served.values():
            process.close()
    report.print()
    if options.json:
        report.write(options.json)


def serve(folder: str, stand_ins: str) -> None:
    """Answer each target on standard input by its figures, as JSON; runs in any checkout, on another's `stand_ins`."""
    import pytest

    from mllm_edge.export.pipeline import export
    from tests.tiny import save_tiny_idefics3

    bundle, checkpoint = Path(folder), Path(f"{folder}-checkpoint")
    save_tiny_idefics3(checkpoint, text=_TEXT)
    export(str(checkpoint), bundle, targets=tuple(_MOST_MS), recipe_name="fp16", verify_mode="off")
    with pytest.MonkeyPatch.context() as patch:
        stand_in = _stand_in(Path(stand_ins))
        # It is stricter than when an earlier build was made, about engines; what they take to run is measured here.
        patch.setattr(stand_in, "_check_shapes", lambda *_: None)
        patch.setattr(stand_in, "refused", lambda *_: [])
        patch.setattr(stand_in.StandIn, "take", lambda machine, log: setattr(machine, "_log", lambda: log))
        machine = stand_in.install(patch)
        for line in sys.stdin:
            print(json.dumps(_figures(bundle, line.strip(), machine)), flush=True)


def _stand_in(root: Path) -> Any:
    """The stand-in of a checkout, whichever one the package is of."""
    for name in ("cuda_stand_in", "tensorrt_versions", "tensorrt_stand_in"):
        path = root / "tests" / "runtime" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"tests.runtime.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _figures(bundle: Path, target: str, machine: Any) -> dict[str, float]:
    from mllm_edge import VLM

    machine.executes = False
    with VLM.load(bundle, backend=target, notice=lambda text: None) as vlm:
        times = _steps(vlm.decoder, [1] * _STEPS)
        figures = {"step ms": 1000 * statistics.median(times)}
    for name, widths in (("single", [1] * _STEPS), ("guessed", [1 + i * 7 % 16 for i in range(_STEPS)])):
        with VLM.load(bundle, backend=target, notice=lambda text: None) as vlm:
            machine.counts.clear()
            _steps(vlm.decoder, widths)
        figures |= {
            f"allocated, {name}": machine.counts["page-locked allocations"],
            f"recorded, {name}": machine.counts["records"],
            f"replayed, {name}": machine.counts["replays"],
        }
    return figures


def _steps(decoder: Any, widths: list[int]) -> list[float]:
    """Seconds that the cache and the session take in each step of so many rows."""
    import numpy as np

    hidden = np.zeros((_PROMPT, _TEXT["hidden_size"]), np.float32)
    cache = decoder.reset(_PROMPT + 3 * _STEPS)
    step = _step_of(decoder)
    step(hidden, 1)
    times = []
    with _timed(decoder) as spent:
        for width in widths:
            length, spent[0] = cache.length, 0.0
            step(hidden[:width], width)
            cache.truncate(length + 1 + width // 3)  # some guesses come true
            times.append(spent[0])
    return times


def _step_of(decoder: Any) -> Callable[[Any, int], object]:
    """A step of hidden states that projects its last so many rows, of which the largest logits leave the device."""
    if not hasattr(decoder, "top_logits"):  # a checkout of before 2026-11-30
        return lambda hidden, rows: decoder.best_rows(hidden, range(len(hidden) - rows, len(hidden)))
    return lambda hidden, rows: decoder.top_logits(hidden, project=None if rows == 1 else range(rows))


@contextmanager
def _timed(decoder: Any) -> Iterator[list[float]]:
    """Adds up the time in what a step calls of the cache and the session."""
    spent = [0.0]
    places = [(type(decoder.cache), "advance"), (type(decoder._session), "run")]
    originals = [getattr(owner, name) for owner, name in places]

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.perf_counter() - begin

        return call

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield spent
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
