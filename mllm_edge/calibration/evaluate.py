"""The proof: a quantized bundle beside the float one it came from, on samples that calibration did not see."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.calibration.collect import answer_tokens, answered_together
from mllm_edge.calibration.data import Sample
from mllm_edge.compare.metrics import agreement, divergence
from mllm_edge.compare.outputs import seen
from mllm_edge.json_form import to_json
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.vlm import VLM

__all__ = ["LED_TOKENS", "Distance", "Proof", "led_tokens", "prove"]

LED_TOKENS = 32  # of an answer along which bundles are compared
_POSITIONS = 8  # of the answer that are reported one by one


@dataclass(frozen=True)
class Distance:
    """Between a component's outputs: `sqnr` in dB (10·log10 of the signal's power over the error's), `cosine`."""

    sqnr: float
    cosine: float


@dataclass(frozen=True)
class Proof:
    """What quantization changed. `components`: of vision outputs, all samples together. `kl`: mean KL divergence of
    the next token's distribution, in nats, along the float bundle's answers; `top1`: how often the likeliest token
    stays the same, by position too. `prefix`: mean part of the float bundle's answer that greedy decoding repeats.
    `exact_match`: part of the known answers given word for word (float, quantized), where there are any. `question`:
    the first sample's, with the greedy answers of both. Times are medians in seconds."""

    samples: int
    positions: int
    components: Mapping[str, Distance]
    kl: float
    kl_worst: float
    top1: float
    top1_by_position: tuple[float, ...]
    prefix: float
    exact_match: tuple[float, float] | None
    question: str
    answer_before: str
    answer_after: str
    nbytes: tuple[int, int]
    prefill_seconds: tuple[float, float]
    token_seconds: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return to_json(self)


@dataclass(frozen=True, eq=False)
class _Run:
    """One side's outputs for a sample."""

    outputs: dict[str, np.ndarray]
    logits: np.ndarray
    greedy: np.ndarray
    prefill: float
    token: float


def prove(
    float_bundle: Path,
    quantized: Path,
    samples: Sequence[Sample],
    threads: int | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> Proof:
    """Run both bundles on `samples`; `progress(1)` after each."""
    with VLM.load(float_bundle, threads=threads) as a, VLM.load(quantized, threads=threads) as b:
        tally = _Tally()
        for sample in samples:
            tally.add(sample, *_pair(a, b, sample), a, b)
            progress(1)
        return tally.proof(a.bundle.nbytes, b.bundle.nbytes)


def led_tokens(vlm: VLM, samples: Sequence[Sample], prompts: Sequence[Encoded]) -> list[np.ndarray]:
    """The tokens [n] along which bundles are compared: each sample's answer or, where it has none, the greedy one of
    the float bundle opened as `vlm`."""
    answers = [answer_tokens(vlm, sample) for sample in samples]
    asked = [i for i, answer in enumerate(answers) if answer is None]
    together = answered_together(vlm, [prompts[i] for i in asked], LED_TOKENS)
    greedy = {asked[n]: answer for n, answer in together.items()}
    led = []
    for i, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        tokens = greedy.get(i, answer)
        led.append(vlm.greedy([prompt], _most(vlm, prompt))[0] if tokens is None else tokens[: _most(vlm, prompt)])
    return led


def _most(vlm: VLM, prompt: Encoded) -> int:
    return min(LED_TOKENS, vlm.context_length - len(prompt))


def _pair(a: VLM, b: VLM, sample: Sample) -> tuple[_Run, _Run, np.ndarray | None]:
    answer = answer_tokens(a, sample)
    first = _run(a, sample, answer)
    led = first.greedy if answer is None else answer
    return first, _run(b, sample, led), answer


def _run(vlm: VLM, sample: Sample, answer: np.ndarray | None) -> _Run:
    prompt = vlm.processor.process(sample.prompt, sample.images)
    encoded, outputs = seen(vlm, prompt)
    most = _most(vlm, encoded)
    begin = time.perf_counter()
    (greedy,) = vlm.greedy([encoded], most)
    token = (time.perf_counter() - begin) / max(len(greedy), 1)
    tokens = (greedy if answer is None else answer)[:most]
    begin = time.perf_counter()
    logits = vlm.score(encoded, tokens)
    return _Run(outputs, logits, greedy, time.perf_counter() - begin, token)


class _Tally:
    """Sums over samples."""

    def __init__(self) -> None:
        self._powers: dict[str, np.ndarray] = {}
        self._kl: list[np.ndarray] = []
        self._same: list[np.ndarray] = []
        self._prefix: list[float] = []
        self._exact: list[tuple[bool, bool]] = []
        self._times: list[tuple[float, float, float, float]] = []
        self._samples = 0
        self._example = ("", "", "")

    def add(self, sample: Sample, a: _Run, b: _Run, answer: np.ndarray | None, one: VLM, other: VLM) -> None:
        for name, x in a.outputs.items():
            sums = self._powers.setdefault(name, np.zeros(4))
            sums += _powers(x, b.outputs[name])
        self._kl.append(divergence(a.logits, b.logits))
        self._same.append(agreement(a.logits, b.logits))
        self._prefix.append(_prefix(a.greedy, b.greedy))
        if sample.answer is not None:
            self._exact.append(
                (_text(one, a.greedy) == sample.answer.strip(), _text(other, b.greedy) == sample.answer.strip())
            )
        self._times.append((a.prefill, b.prefill, a.token, b.token))
        if not self._example[1]:  # the first that the float model says anything to
            example = sample.prompt, _text(one, a.greedy), _text(other, b.greedy)
            self._example = example if example[1] or not self._samples else self._example
        self._samples += 1

    def proof(self, float_bytes: int, quantized_bytes: int) -> Proof:
        kl, times = np.concatenate(self._kl), np.median(np.array(self._times), axis=0)
        longest = max(len(same) for same in self._same)
        by_position = [[same[i] for same in self._same if len(same) > i] for i in range(min(longest, _POSITIONS))]
        return Proof(
            samples=self._samples,
            positions=len(kl),
            components={name: _distance(sums) for name, sums in self._powers.items()},
            kl=float(kl.mean()),
            kl_worst=float(kl.max()),
            top1=float(np.concatenate(self._same).mean()),
            top1_by_position=tuple(float(np.mean(p)) for p in by_position),
            prefix=float(np.mean(self._prefix)),
            exact_match=tuple(np.mean(self._exact, axis=0).tolist()) if self._exact else None,
            question=self._example[0],
            answer_before=self._example[1],
            answer_after=self._example[2],
            nbytes=(float_bytes, quantized_bytes),
            prefill_seconds=(float(times[0]), float(times[1])),
            token_seconds=(float(times[2]), float(times[3])),
        )


def _powers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[Σa², Σ(a−b)², Σab, Σb²]."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return np.array([a @ a, (a - b) @ (a - b), a @ b, b @ b])


def _distance(sums: np.ndarray) -> Distance:
    signal, error, product, other = sums
    sqnr = float(10 * np.log10(signal / error)) if error > 0 else float("inf")
    return Distance(sqnr=min(sqnr, 200.0), cosine=float(product / max(np.sqrt(signal * other), 1e-30)))


def _prefix(a: np.ndarray, b: np.ndarray) -> float:
    """The part of `a` that `b` repeats from its start."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return float(differs[0] if len(differs) else length) / max(len(a), 1)


def _text(vlm: VLM, tokens: np.ndarray) -> str:
    return vlm.tokenizer.decode([int(t) for t in tokens if int(t) not in vlm.stop_ids]).strip()
