"""What an application gains that asks more than once: TTFT of a second question about an image, of a tenth turn, and
the time of scores, each over what it is without.

python -m benchmarks.embedding [--only CHECK …] [--sizes sample smolvlm] [--rounds N] [--json F] [--folder DIR]
                               [--cache DIR]

Exported with the recipe int4: the sample model, and random weights of SmolVLM-256M's sizes at 17 tiles. Within a round
the two sides of a ratio follow each other; medians of the rounds' ratios count. Speculation is off but for `lookup_*`.

`against_peer` runs when it is asked for: conversations about an image beside OpenVINO GenAI, in an environment of its
own below --cache that is set up at first (5 GB), on random weights of sizes of its own; 5 GB below --folder while it
runs, and 8 GB of memory while the peer exports. There "first" is the peer's TTFT and "second" ours.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.against_peer import against_peer
from benchmarks.bundles import export_by
from benchmarks.frames import frame
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m
from mllm_edge.runtime.conversation import Conversation
from mllm_edge.runtime.vlm import VLM

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_PEER = "against_peer"
_EDGE = 2048  # px; SmolVLM-256M cuts a square of that into 16 tiles and the overview
_SAMPLE = _ROOT / "examples" / "sample_vlm" / "model"
_WORDS = (
    *("nothing", "everything", "yesterday", "tomorrow", "somewhere"),
    *("anything", "understanding", "otherwise", "meanwhile", "afterwards"),
)
_LONG = "The quick brown fox jumps over the lazy dog beside the old mill, and nobody looks. "


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*_CHECKS, _PEER], default=list(_CHECKS))
    parser.add_argument("--sizes", nargs="+", choices=("sample", "smolvlm"), default=["sample", "smolvlm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mllm-edge-benchmarks")
    options = parser.parse_args()
    report = Report(f"Asking more than once, medians of {options.rounds} rounds")
    checks = [name for name in options.only if name != _PEER]
    with tempfile.TemporaryDirectory(prefix="mllm-edge-", dir=options.folder) as folder:
        for size in options.sizes if checks else ():
            with VLM.load(_bundle(size, Path(folder))) as vlm:
                for name in checks:
                    check, target, least = _CHECKS[name]
                    found = [check(vlm, i) for i in range(1 + options.rounds)][1:]  # the first warms up
                    medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
                    report.row({"check": name, "model": size, **_told(medians)})
                    if size == "smolvlm" or name.startswith("lookup"):
                        (report.at_least if least else report.at_most)(f"{name}, {size}", medians["ratio"], target)
        if _PEER in options.only:
            against_peer(report, Path(folder), options.cache, options.rounds)
    report.print()
    if options.json:
        report.write(options.json)


def _told(medians: Mapping[str, float]) -> dict[str, Any]:
    seconds = {key: medians[key] for key in ("first, s", "second, s")}
    rest = {key: value for key, value in medians.items() if key not in (*seconds, "ratio")}
    return {**seconds, "ratio": medians["ratio"], "beside": ", ".join(f"{k} {v:.4g}" for k, v in rest.items())}


def _bundle(size: str, folder: Path) -> Path:
    model = _SAMPLE
    if size == "smolvlm":
        model = folder / "model"
        smolvlm_256m(model, longest_edge=_EDGE)
    return export_by(_ROOT, model, folder / size)


def _second_question(vlm: VLM, round_: int) -> dict[str, float]:
    picture = frame(round_, _EDGE)
    began = time.perf_counter()
    image = vlm.encode_image(picture)
    looked = time.perf_counter() - began
    first = looked + vlm.generate("What is in the picture?", image, max_new_tokens=1).metrics.ttft
    second = vlm.generate("Which colours are there, and where?", image, max_new_tokens=1).metrics
    return {"first, s": first, "second, s": second.ttft, "ratio": second.ttft / first, "tokens": second.prompt_tokens}


def _tenth_turn(vlm: VLM, round_: int) -> dict[str, float]:
    """Over a fresh prompt of the turn's new tokens alone; behind it the history is only looked at."""
    chat = vlm.chat()
    chat.attach(frame(round_, _EDGE))
    for i in range(9):
        _said(chat, f"What is there to see in row {i} of the picture?", 12)
    metrics = _said(chat, "And what is there to see in the last row?", 1)
    new = metrics.prompt_tokens - metrics.reused
    alone = vlm.generate(_of(vlm, new), raw=True, max_new_tokens=1).metrics
    return {
        "first, s": alone.ttft,
        "second, s": metrics.ttft,
        "ratio": metrics.ttft / alone.ttft,
        "new tokens": new,
        "tokens before": metrics.reused,
        "prefill, s": metrics.stages["prefill"],
        "prefill alone, s": alone.stages["prefill"],
    }


def _said(chat: Conversation, question: str, most: int) -> Any:
    *_, last = chat.ask(question, max_new_tokens=most, ignore_eos=True)
    assert last.result is not None
    return last.result.metrics


def _of(vlm: VLM, tokens: int) -> str:
    """A text of so many tokens."""
    text = _LONG * 40
    ids = vlm.tokenizer.encode(text)[:tokens]
    return vlm.tokenizer.decode(ids)


def _score_ten(vlm: VLM, round_: int) -> dict[str, float]:
    prompt = _of(vlm, min(1000, vlm.context_length - 40))
    alone = vlm.generate(prompt, max_new_tokens=1, ignore_eos=True).metrics
    tokens = vlm.count_tokens(prompt)
    began = time.perf_counter()
    scores = vlm.score_answers(prompt, answers=[_three(vlm, word) for word in _WORDS])
    scored = time.perf_counter() - began
    mean = statistics.mean(len(score.tokens) for score in scores)
    return {
        "first, s": alone.ttft, "second, s": scored, "ratio": scored / alone.ttft, "tokens": tokens,
        "tokens of an answer": mean,
    }  # fmt: skip


def _three(vlm: VLM, word: str) -> str:
    """The beginning of `word word word` that is three tokens, of whatever vocabulary."""
    ids = vlm.tokenizer.encode(f"{word} {word} {word}")
    return vlm.tokenizer.decode(ids[:3])


def _lookup(text: str) -> Callable[[VLM, int], dict[str, float]]:
    """Decode speed with prompt lookup over that without, on a text that repeats or that doesn't: a penalty below 0
    rewards what was said, one above 0 forbids it."""

    def check(vlm: VLM, round_: int) -> dict[str, float]:
        options = {"max_new_tokens": 64, "ignore_eos": True, "raw": True}
        penalty = -2.0 if text == "repeats" else 2.0
        prompt = _LONG * 2
        plain = vlm.generate(prompt, frequency_penalty=penalty, **options).metrics  # type: ignore[arg-type]
        guessed = vlm.generate(prompt, frequency_penalty=penalty, speculation=8, **options).metrics  # type: ignore[arg-type]
        first, second = sum(plain.token_seconds), sum(guessed.token_seconds)
        return {
            "first, s": first, "second, s": second, "ratio": first / second, "guessed": guessed.guessed,
            "accepted": guessed.accepted,
        }  # fmt: skip

    return check


# The measurement, its target, and whether that is the least.
_CHECKS: Mapping[str, tuple[Callable[[VLM, int], dict[str, float]], float, bool]] = {
    "second_question": (_second_question, 0.03, False),
    "tenth_turn": (_tenth_turn, 1.5, False),
    "score_ten": (_score_ten, 1.15, False),
    "lookup_repeat": (_lookup("repeats"), 2.0, True),
    "lookup_none": (_lookup("does not"), 0.97, True),
}


if __name__ == "__main__":
    main()
