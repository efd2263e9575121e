"""What `mllm-edge profile` says, held against itself and against a stopwatch of one's own.

python -m benchmarks.profiler [--only NAME …] [--json F] [--folder DIR] [--iterations N] [-n N]
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.measure import in_process
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m

__all__ = ["main"]

_SAMPLE = Path(__file__).parents[1] / "examples" / "sample_vlm" / "model"
_PROMPT = "What is in the picture?"
_PERCENT = {"stages_sum": 3.0, "profiling_overhead": 2.0, "independent_stopwatch": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=_MODELS, default=list(_MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (1 GB)")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("-n", "--new-tokens", type=int, default=128)
    options = parser.parse_args()
    report = Report("The profiler: two profiles, and calls timed from outside; per cent")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
            bundle = Path(folder) / "bundle"
            in_process(_MODELS[name], bundle)
            row = in_process(_measure, bundle, options.iterations, options.new_tokens).result
        report.rows.append({"model": name, **row})
        for check, limit in _PERCENT.items():
            report.at_most(f"{name}: {check} %", row[f"{check} %"], limit)
        report.at_most(f"{name}: two_runs_agree, difference of totals %", row["two runs %"], row["their spread %"])
    report.print()
    if options.json:
        report.write(options.json)


def _sample(bundle: Path) -> None:
    from mllm_edge.export.pipeline import export

    export(str(_SAMPLE), bundle, recipe_name="int4", verify_mode="off")


def _smolvlm(bundle: Path) -> None:
    from mllm_edge.export.pipeline import export

    checkpoint = bundle.with_name("checkpoint")
    smolvlm_256m(checkpoint, longest_edge=512)
    export(str(checkpoint), bundle, recipe_name="int4", verify_mode="off")


_MODELS: dict[str, Callable[[Path], None]] = {"sample model": _sample, "SmolVLM-256M": _smolvlm}


def _measure(bundle: Path, iterations: int, tokens: int) -> dict[str, Any]:
    from mllm_edge.runtime.profiling.diff import compare_profiles
    from mllm_edge.runtime.vlm import VLM

    # As two people would: each in a process of its own.
    first, second = (in_process(_profile, bundle, iterations, tokens).result for _ in range(2))
    total = next(c for c in compare_profiles(first, second).changes if c.name == "total")
    assert total.noise is not None
    with VLM.load(bundle) as vlm:
        turns = _stopwatch(vlm, tokens, iterations)
        overhead = _overhead(vlm, tokens, iterations)
    return {
        "total ms": 1000 * total.before,
        "profile tok/s": statistics.median(said for said, _ in turns),
        "stopwatch tok/s": statistics.median(rate for _, rate in turns),
        "stages_sum %": 100 * max(1 - first["coverage"], 1 - second["coverage"]),
        "two runs %": 100 * abs(total.growth),
        "their spread %": 100 * total.noise / total.before,
        "profiling_overhead %": overhead,
        "independent_stopwatch %": 100 * abs(statistics.median(said / rate for said, rate in turns) - 1),
    }


def _profile(bundle: Path, iterations: int, tokens: int) -> dict[str, Any]:
    from mllm_edge.runtime.profiling.measure import profile

    return profile(bundle, _PROMPT, new_tokens=tokens, iterations=iterations).as_dict()


def _stopwatch(vlm: Any, tokens: int, iterations: int) -> list[tuple[float, float]]:
    """Tokens per second as profile's own calls tell, and by a stopwatch around `vlm.stream`, of calls that take turns
    on one loaded model: between two loads the rates differ by more than the definitions.

    Every token is spelt as a letter, for random weights choose tokens without a text, and no piece would come.
    """
    from mllm_edge.runtime.profiling.measure import synthetic_image
    from mllm_edge.runtime.profiling.runs import Asker

    vlm.tokenizer.token = lambda token_id: "a"
    asker = Asker(vlm, _PROMPT, [synthetic_image()], tokens)
    return [(asker.ask("").tokens_per_second, _watched(vlm, tokens)) for _ in range(2 + 2 * iterations)][2:]


def _watched(vlm: Any, tokens: int) -> float:
    """Tokens per second from the first token's text to the last one's: what comes behind is no token's time."""
    from mllm_edge.runtime.profiling.measure import synthetic_image
    from mllm_edge.runtime.prompt.tokenizer import StreamDecoder

    times: list[float] = []
    for chunk in vlm.stream(_PROMPT, [synthetic_image()], max_new_tokens=tokens, ignore_eos=True):
        if chunk.token_ids:
            times.append(time.perf_counter())
    assert chunk.result is not None
    text = StreamDecoder(vlm.tokenizer)
    told = [n for n, token in enumerate(chunk.result.token_ids) if text.push(token)]  # others bring no text
    assert len(told) == len(times)
    return (told[-1] - told[0]) / (times[-1] - times[0])


def _overhead(vlm: Any, tokens: int, iterations: int) -> float:
    """By how many per cent the time per token is longer with spans than without, calls of both taking turns."""
    from mllm_edge.runtime.trace import Trace

    class Silent(Trace):
        def span(self, name: str) -> AbstractContextManager[None]:
            return contextlib.nullcontext()

    seconds: dict[type[Trace], list[float]] = {Silent: [], Trace: []}
    for _ in range(1 + 2 * iterations):
        for kind, found in seconds.items():
            options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True, "trace": kind()}
            found.append(statistics.median(vlm.generate("Hello.", **options).metrics.token_seconds))
    without, with_spans = (statistics.median(found[1:]) for found in seconds.values())
    return 100 * (with_spans / without - 1)


if __name__ == "__main__":
    main()
