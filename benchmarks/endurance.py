"""Thousands of calls of all kinds, some cancelled, cut off or wrong: what memory, handles and threads grow by.

python -m benchmarks.endurance [BUNDLE] [--calls N] [--json F]

Without BUNDLE the sample model by the recipe int4. The first fifth of the calls is a warm-up: what the process has by
then is what it is compared with at the end. The calls are drawn with a fixed seed, and every hundredth is one whose
answer is known: it must still be the same.
"""

import argparse
import asyncio
import gc
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.bundles import export_by
from benchmarks.report import Report
from mllm_edge.errors import CancelledError, ImageError, MllmEdgeError, OptionError, TimedOutError
from mllm_edge.runtime.asynchronous import AsyncVLM
from mllm_edge.runtime.machine.cpu import give_back_memory, resident
from mllm_edge.runtime.stopping import Cancel
from mllm_edge.runtime.vlm import VLM

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_SAMPLE = _ROOT / "examples" / "sample_vlm" / "model"
_QUESTION, _KNOWN_EVERY = "What is in the picture?", 100
_CACHE = 4 << 20  # bytes for images, and for prefixes; small, so that they turn over from early on


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(f"{options.calls} calls of all kinds")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        path = options.bundle or export_by(_ROOT, _SAMPLE, Path(folder) / "sample")
        with VLM.load(path, image_cache=_CACHE, prefix_cache=_CACHE) as vlm:
            _endure(vlm, options.calls, report)
        gc.collect()
        give_back_memory()
        report.row({"calls": "closed", **_held()})
    report.print()
    if options.json:
        report.write(options.json)


def _endure(vlm: VLM, calls: int, report: Report) -> None:
    draw, done = random.Random(0), Counter[str]()
    picture = _picture(0)
    known = vlm.generate(_QUESTION, picture, max_new_tokens=8).token_ids
    before: Mapping[str, int] = {}
    for i in range(calls + 1):
        if i and i % max(calls // 10, 1) == 0:
            gc.collect()
            give_back_memory()
            held = _held()
            report.row({"calls": i, **held})
            if i == calls // 5 or not before:
                before = held
        if i % _KNOWN_EVERY == 0:
            assert vlm.generate(_QUESTION, picture, max_new_tokens=8).token_ids == known
            continue
        name = draw.choice(list(_KINDS))
        done[name + _outcome(_KINDS[name], vlm, draw)] += 1
    report.title += ": " + ", ".join(f"{n} {name}" for name, n in sorted(done.items()))
    report.at_most("memory, growth", held["resident, MB"] / before["resident, MB"] - 1, 0.01)
    report.at_most("handles, growth", held["handles"] - before["handles"], 0)
    report.at_most("threads, growth", held["threads"] - before["threads"], 0)


def _held() -> dict[str, int]:
    handles = Path("/proc/self/fd")
    count = len(list(handles.iterdir())) if handles.is_dir() else 0
    return {"resident, MB": resident() >> 20, "handles": count, "threads": threading.active_count()}


def _outcome(kind: Callable[[VLM, random.Random], None], vlm: VLM, draw: random.Random) -> str:
    try:
        kind(vlm, draw)
    except (CancelledError, TimedOutError):
        return ", ended early"
    except MllmEdgeError:
        return ", refused"
    return ""


def _picture(seed: int) -> np.ndarray:
    height, width = 40 + 8 * (seed % 17), 60 + 8 * (seed % 13)
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _plain(vlm: VLM, draw: random.Random) -> None:
    seed = draw.randrange(40)
    vlm.generate(_QUESTION, _picture(seed), max_new_tokens=draw.randint(1, 8), reuse=draw.random() < 0.5)


def _abandoned(vlm: VLM, draw: random.Random) -> None:
    for chunk in vlm.stream(_QUESTION, _picture(draw.randrange(40)), max_new_tokens=30, ignore_eos=True):
        if chunk.text and draw.random() < 0.5:
            break


def _cancelled(vlm: VLM, draw: random.Random) -> None:
    cancel = Cancel()
    timer = threading.Timer(draw.random() * 0.03, cancel.cancel)
    timer.start()
    try:
        vlm.generate(_QUESTION, _picture(draw.randrange(40)), max_new_tokens=30, ignore_eos=True, cancel=cancel)
    finally:
        timer.join()


def _timed_out(vlm: VLM, draw: random.Random) -> None:
    vlm.score_answers(
        _QUESTION, _picture(draw.randrange(40)), answers=["yes", "no"], timeout=draw.random() * 0.03 + 1e-6
    )


def _wrong(vlm: VLM, draw: random.Random) -> None:
    if draw.random() < 0.5:
        vlm.generate(_QUESTION, b"no picture")
        raise AssertionError(ImageError)
    vlm.generate(_QUESTION, max_new_tokens=-1)
    raise AssertionError(OptionError)


def _talk(vlm: VLM, draw: random.Random) -> None:
    chat = vlm.chat()
    chat.attach(_picture(draw.randrange(40)))
    for text in ("What is there?", "And what else?"):
        list(chat.ask(text, max_new_tokens=4))
    other = chat.fork()
    chat.truncate(1)
    list(other.ask("Sure?", max_new_tokens=2))


def _awaited(vlm: VLM, draw: random.Random) -> None:
    async def ask() -> None:
        call = AsyncVLM(vlm).generate(_QUESTION, _picture(draw.randrange(40)), max_new_tokens=20, ignore_eos=True)
        try:
            await asyncio.wait_for(call, draw.random() * 0.05)
        except asyncio.TimeoutError:
            raise CancelledError("in time", "") from None

    asyncio.run(ask())


_KINDS: Mapping[str, Callable[[VLM, random.Random], None]] = {
    "plain": _plain,
    "abandoned": _abandoned,
    "cancelled": _cancelled,
    "timed out": _timed_out,
    "wrong": _wrong,
    "talk": _talk,
    "awaited": _awaited,
}


if __name__ == "__main__":
    main()
