"""Conversations about an image beside OpenVINO GenAI, turn by turn: time to the first token."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peer_openvino
from benchmarks.bundles import export_by
from benchmarks.frames import frame
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import GEOMETRIES
from benchmarks.worker import Worker
from mllm_edge.runtime.machine.cpu import physical_cores
from mllm_edge.runtime.prompt.sources import EncodedImage
from mllm_edge.runtime.vlm import VLM

__all__ = ["against_peer"]

MODEL = "Qwen3-VL, Qwen3-0.6B"
MOST = 0.8
EDGE = 768  # px: 576 image tokens
_ROOT = Path(__file__).parents[1]
_TURNS = 10
_ANSWER = 12  # tokens
_AGAIN = "a second question"  # in a conversation of its own


def against_peer(report: Report, folder: Path, cache: Path, rounds: int) -> None:
    """Rows and checks of the second turn, of the tenth, and of a second conversation about the same image.

    Both sides get the same random checkpoint in 4 bits, the same image and texts, as many threads; answers have the
    same lengths, and none is guessed. Each turn is asked of one after the other, begun by another one in each round.
    Of the peer's backends the faster one, for each figure, is the one compared.
    """
    python = peer_openvino.environment(cache)
    checkpoint, exported = folder / "checkpoint", folder / "openvino"
    GEOMETRIES[MODEL](checkpoint)
    peer_openvino.export(python, checkpoint, exported)
    bundle = export_by(_ROOT, checkpoint, folder / "bundle")
    _measure(report, folder, bundle, python, exported, rounds)


def _measure(report: Report, folder: Path, bundle: Path, python: Path, exported: Path, rounds: int) -> None:
    threads = physical_cores()
    with ExitStack() as stack:
        sides: list[_Ours | _Theirs] = [_Ours(stack.enter_context(VLM.load(bundle, threads=threads)))]
        for backend in peer_openvino.BACKENDS:
            name = f"{peer_openvino.NAME} {backend}"
            command = peer_openvino.command(python, exported, threads, backend)
            sides.append(_Theirs(stack.enter_context(Worker(name, command, folder / f"{backend}.log"))))
        found = [_round(sides, folder, number) for number in range(1 + rounds)][1:]  # the first warms up
    for turn in ("turn 2", f"turn {_TURNS}", _AGAIN):
        _report(report, turn, [round_[turn] for round_ in found])


class _Ours:
    name = "mllm-edge"

    def __init__(self, vlm: VLM):
        self._vlm = vlm
        self._chat = vlm.chat()
        self._seen: dict[Path, EncodedImage] = {}

    def ask(self, text: str, tokens: int, image: Path | None) -> dict[str, Any]:
        """Seconds to the first token, prompt tokens and stages; an image begins a conversation."""
        pixels = np.load(image) if image else np.empty(0)
        began = time.perf_counter()
        if image is not None:
            if image not in self._seen:
                self._seen = {image: self._vlm.encode_image(pixels)}
            self._chat = self._vlm.chat()
            self._chat.attach(self._seen[image])
        at, result = None, None
        for chunk in self._chat.ask(text, max_new_tokens=tokens, ignore_eos=True):
            at, result = at or time.perf_counter(), chunk.result
        assert at is not None
        assert result is not None
        return {"ttft": at - began, "tokens": result.metrics.prompt_tokens, "metrics": result.metrics}


class _Theirs:
    def __init__(self, worker: Worker):
        self._worker, self.name = worker, worker.name

    def ask(self, text: str, tokens: int, image: Path | None) -> dict[str, Any]:
        """As ours."""
        return self._worker.ask({"text": text, "tokens": tokens, "image": None if image is None else str(image)})


def _round(sides: Sequence[_Ours | _Theirs], folder: Path, number: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What each side answered, by turn and by side."""
    image = folder / f"{number}.npy"
    np.save(image, frame(number, EDGE))
    texts = [f"What is there to see in row {i} of the picture?" for i in range(1, 1 + _TURNS)]
    turns = {f"turn {i}": (text, None if i > 1 else image) for i, text in enumerate(texts, 1)}
    turns[_AGAIN] = ("Which colours are there, and where?", image)
    first = number % len(sides)
    order = [*sides[first:], *sides[:first]]
    return {
        turn: {side.name: side.ask(text, _ANSWER, shown) for side in order} for turn, (text, shown) in turns.items()
    }


def _report(report: Report, turn: str, found: Sequence[dict[str, dict[str, Any]]]) -> None:
    seconds = {name: statistics.median(round_[name]["ttft"] for round_ in found) for name in found[0]}
    ours = seconds.pop(_Ours.name)
    peer = min(seconds, key=seconds.__getitem__)
    ratio = statistics.median(round_[_Ours.name]["ttft"] / round_[peer]["ttft"] for round_ in found)
    row = {"check": turn, "model": MODEL, "first, s": seconds[peer], "second, s": ours, "ratio": ratio}
    last = found[-1]
    peers = [f"{name} {s:.4g} s (by its own metrics, last, {last[name]['told']:.4g})" for name, s in seconds.items()]
    metrics = last[_Ours.name]["metrics"]
    stages = ", ".join(f"{name} {1000 * s:.3g}" for name, s in metrics.stages.items() if s > 1e-4)
    tokens = f"{metrics.prompt_tokens - metrics.reused} new tokens behind {metrics.reused}, the peer counts"
    beside = [*peers, f"{tokens} {last[peer]['tokens']}", f"ours in ms: {stages}"]
    report.row({**row, "beside": "; ".join(beside)})
    report.at_most(f"{turn}, TTFT over that of {peer}", ratio, MOST)
