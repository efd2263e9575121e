"""What quantization costs, in words a user understands: a bundle against its source model on built-in questions.

The source's own greedy answers lead. `References` are what it says, computed once; `measure` compares any number of
bundles with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.calibration.collect import greedy_tokens
from mllm_edge.calibration.evaluate import divergence
from mllm_edge.calibration.recipes import BLOCKS_8, HEAD_8
from mllm_edge.errors import AccuracyError, MllmEdgeError
from mllm_edge.export.loss_questions import QUESTIONS
from mllm_edge.export.reference import greedy_answers, quiet_transformers, rounded, scores
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.processor import Processor
from mllm_edge.runtime.score import score
from mllm_edge.runtime.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.runtime.vlm import VLM

if TYPE_CHECKING:
    from mllm_edge.export.verify import Reference, VerifyCase

__all__ = ["MAX_KL", "WARN_KL", "Loss", "References", "ask", "measure"]

MAX_KL = 0.5  # nats; an export that loses more fails
WARN_KL = 0.1  # nats; from here on users notice
_TOKENS = 40  # of each answer
_FEWEST = 2  # tokens of an answer


@dataclass(frozen=True)
class Loss:
    """Mean KL divergence in nats of a bundle's next token from the source model's along the source's greedy answers,
    how often the likeliest token stays the same, and over how many positions. `kl_8_bits`, `agreement_8_bits`: the same
    for the source with its language model rounded to 8-bit blocks, on the questions without pictures; None where that
    was not measured, for losses that are not worth it. `question`: one of them, and what the source and the bundle
    answer."""

    kl: float
    agreement: float
    positions: int
    kl_8_bits: float | None
    agreement_8_bits: float | None
    question: str
    answer_before: str
    answer_after: str


@dataclass(frozen=True, eq=False)
class _Answered:
    """A question, and what the source says: its answer [n] and the logits [n, vocabulary] it came from."""

    question: str
    images: tuple[Any, ...]
    ids: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, eq=False)
class References:
    """What the source model answers to the built-in questions; the first is shown to people."""

    answered: tuple[_Answered, ...]
    model: Any
    # Of prompts with pictures, by the question and the files that make them: candidates often differ in the decoder.
    embeds: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    @cached_property
    def eight_bits(self) -> tuple[float, float]:
        """(mean KL in nats, agreement) of the source model with its language model in 8-bit blocks."""
        texts = [a for a in self.answered if not a.images]
        with quiet_transformers(), rounded(self.model, BLOCKS_8, HEAD_8):
            found = scores(self.model, [a.ids for a in texts], [a.tokens for a in texts])
        return _compared([a.logits for a in texts], found)

    @cached_property
    def unrelated(self) -> float:
        """Mean KL in nats between the source's distributions at different positions: what a bundle would have whose
        logits have nothing to do with the source's."""
        logits = np.concatenate([a.logits for a in self.answered])
        return float(divergence(logits, np.roll(logits, len(logits) // 2, axis=0)).mean())


def ask(reference: "Reference", folder: Path, picture: "VerifyCase | None" = None) -> References:
    """The source's answers to the built-in questions, their ids made by the bundle in `folder`, and to `picture`.

    Raises AccuracyError where there is nothing to ask: no chat template that takes a question, too short a context.
    """
    bundle = Bundle.load(folder)
    processor, generation = _processor(bundle), bundle.generation()
    longest = bundle.manifest.model.context_length - _FEWEST
    try:
        ids = {question: processor.process(question).token_ids for question in QUESTIONS}
    except MllmEdgeError as e:
        raise AccuracyError(f"the built-in questions cannot be asked: {e.message}", e.fix) from e
    ids = {question: row for question, row in ids.items() if len(row) <= longest}
    if not ids:
        raise AccuracyError(
            f"a context of {longest + _FEWEST} tokens holds none of the built-in questions",
            "compare answers of your own: mllm-edge compare",
        )
    prompts = list(ids.values())
    most = min(_TOKENS, longest + _FEWEST - max(map(len, prompts)))
    with quiet_transformers():
        tokens = greedy_answers(reference.model, prompts, most, frozenset(generation.eos_token_ids))
        # One after another: padding is exact for rotary positions only.
        logits = [scores(reference.model, [p], [t])[0] for p, t in zip(prompts, tokens, strict=True)]
    texts = [
        _Answered(question, (), row, t, rows)
        for question, row, t, rows in zip(ids, prompts, tokens, logits, strict=True)
    ]
    if picture is not None and bundle.manifest.model.image is not None:
        texts.append(_about_picture(reference, processor, picture, frozenset(generation.eos_token_ids)))
    return References(tuple(texts), reference.model)


def measure(references: References, folder: Path, target: str = "cpu") -> Loss:
    """The loss of the bundle in `folder`, its graphs for `target` on ONNX Runtime's CPU provider."""
    first = references.answered[0]
    with VLM(Bundle.load(folder), OnnxRuntimeCpu(target=target)) as vlm:
        found = [_score(vlm, a, references.embeds) for a in references.answered]
        prompt = vlm.processor.process(first.question)
        after = greedy_tokens(vlm, vlm.prompt_embeds(prompt), prompt.positions, max(len(first.tokens), 1))
        answers = [_text(vlm, tokens) for tokens in (first.tokens, after)]
    kl, agreement = _compared([a.logits for a in references.answered], found)
    eight = references.eight_bits if kl >= WARN_KL else (None, None)
    return Loss(
        kl=kl,
        agreement=agreement,
        positions=sum(len(a.tokens) for a in references.answered),
        kl_8_bits=eight[0],
        agreement_8_bits=eight[1],
        question=first.question,
        answer_before=answers[0],
        answer_after=answers[1],
    )


def _processor(bundle: Bundle) -> Processor:
    """As the runtime makes it, without the graphs."""
    generation = bundle.generation()
    template = ChatTemplate.load(bundle.path, generation) if CHAT_TEMPLATE in bundle.manifest.files else None
    return Processor(bundle.manifest.model, Tokenizer.load(bundle.path, generation), template)


def _about_picture(
    reference: "Reference", processor: Processor, case: "VerifyCase", stops: frozenset[int]
) -> _Answered:
    prompt = processor.process(case.prompt, case.images)
    found = reference.run(case.prompt, case.images, prompt.text)
    ends = np.flatnonzero(np.isin(found["tokens"], sorted(stops)))
    n = int(ends[0]) + 1 if len(ends) else len(found["tokens"])
    return _Answered(case.prompt, case.images, prompt.token_ids, found["tokens"][:n], found["logits"][:n])


def _score(vlm: VLM, answered: _Answered, known: dict[tuple[str, ...], np.ndarray]) -> np.ndarray:
    prompt = vlm.processor.process(answered.question, answered.images)
    embeds = None
    if answered.images:
        key = (answered.question, *_seen_by(vlm.bundle, vlm.backend.target))
        if key not in known:
            known[key] = vlm.prompt_embeds(prompt)
        embeds = known[key]
    return score(vlm, prompt, answered.tokens, embeds)


def _seen_by(bundle: Bundle, target: str) -> list[str]:
    """Hashes of the files that make a prompt's embeddings of a picture."""
    graphs = [bundle.variant(name, target).file for name in bundle.manifest.components if name != "decoder"]
    names = [*graphs, *(f"{file}.data" for file in graphs), bundle.manifest.model.embedding.file]
    return [bundle.manifest.files[name].sha256 for name in names if name in bundle.manifest.files]


def _compared(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean KL in nats, part of the positions with the same likeliest token)."""
    pairs = list(zip(expected, found, strict=True))
    kl = np.concatenate([divergence(a, b) for a, b in pairs])
    return float(kl.mean()), float(np.concatenate([a.argmax(axis=1) == b.argmax(axis=1) for a, b in pairs]).mean())


def _text(vlm: VLM, tokens: np.ndarray) -> str:
    return vlm.tokenizer.decode([int(t) for t in tokens if int(t) not in vlm.stop_ids]).strip()
