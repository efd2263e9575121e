"""Many calls from several threads on one model: is every answer the right one, and is none lost?

python -m benchmarks.callers [--calls 5000] [--threads 4] [--bundle DIR] [--json F]

Each thread asks about the example pictures in an order of its own; some answers are streamed, some are abandoned half
way, which counts as a call whose beginning must be right. The expected answers are those of a single caller before.
"""

import argparse
import itertools
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import Report
from mllm_edge import VLM
from mllm_edge.export.pipeline import export

__all__ = ["main"]

_EXAMPLES = Path(__file__).parents[1] / "examples"
_QUESTIONS = ("What is in the picture?", "How many shapes are there?")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--bundle", type=Path, help="default: the sample model at int4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report("Several callers of one model")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        bundle = options.bundle or Path(folder) / "bundle"
        if options.bundle is None:
            export(str(_EXAMPLES / "sample_vlm" / "model"), bundle, recipe_name="int4", verify_mode="off")
        with VLM.load(bundle, threads=1) as vlm:
            begin = time.perf_counter()
            found = _ask_all(vlm, options.calls, options.threads)
            seconds = time.perf_counter() - begin
    counts = {name: found[name] for name in ("right", "right so far", "wrong", "failed")}
    report.rows.append({"threads": options.threads, "calls": options.calls, **counts, "seconds": seconds})
    report.at_most("wrong answers", found["wrong"], 0)
    report.at_most("calls that failed", found["failed"], 0)
    report.at_most("calls that were lost", options.calls - sum(found.values()), 0)
    report.print()
    if options.json:
        report.write(options.json)


def _ask_all(vlm: VLM, calls: int, threads: int) -> Counter[str]:
    pictures = sorted((_EXAMPLES / "images").glob("*.png"))
    cases = list(itertools.product(_QUESTIONS, pictures))
    truth = {case: vlm.generate(case[0], images=[case[1]]).text for case in cases}

    def work(n: int) -> str:
        rng = random.Random(n)
        question, picture = case = rng.choice(cases)
        kind = rng.choice(("generate", "stream", "abandon"))
        try:
            if kind == "generate":
                return "right" if vlm.generate(question, images=[picture]).text == truth[case] else "wrong"
            text, most = "", rng.randrange(1, 4) if kind == "abandon" else len(truth[case]) + 2
            for chunk in itertools.islice(vlm.stream(question, images=[picture]), most):
                text += chunk.text
            if kind == "abandon":
                return "right so far" if truth[case].startswith(text) else "wrong"
            return "right" if text == truth[case] else "wrong"
        except Exception:  # whatever it is, it counts
            return "failed"

    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(work, range(calls)))


if __name__ == "__main__":
    main()
