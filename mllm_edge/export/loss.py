"""Measuring what quantization costs: a bundle against its source model on built-in questions.

The source's own greedy answers lead. `References` are what it says, computed once by `ask`; `measure` compares any
number of bundles with them. What is done about a loss: `judge.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.calibration.sensitivity import Asked, Turn
from mllm_edge.compare.cases import Case
from mllm_edge.errors import AccuracyError, MllmEdgeError
from mllm_edge.export.answers import Answered, References, compared
from mllm_edge.export.checkpoint.quiet import quiet_transformers
from mllm_edge.export.loss_questions import QUESTIONS
from mllm_edge.export.reference import greedy_answers, scores
from mllm_edge.export.source_model import Reference
from mllm_edge.loss import WARN_KL, Loss
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.prompt.processor import Processor, Prompt
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.runtime.vlm import VLM

__all__ = ["WARN_KL", "Loss", "ask", "encoded_once", "keep_encoded", "measure", "turns_of"]

_TOKENS = 32  # of each answer
_SAME = 1e-3  # of the range of logits; as float32 graphs are held to
_FEWEST = 2  # tokens of an answer
_BY_HAND = "compare answers of your own: mllm-edge compare MODEL BUNDLE --prompt TEXT"


def ask(reference: Reference, folder: Path, picture: Case | None = None) -> References:
    """The source's answers to the built-in questions, their ids made by the bundle in `folder`, and to `picture`.

    Raises AccuracyError where they cannot be asked: no chat template or tokenizer for them, too short a context.
    """
    bundle = Bundle.load(folder)
    generation, context = bundle.generation(), bundle.manifest.model.context_length
    tokenizer, stops = Tokenizer.load(bundle.path, generation), frozenset(generation.eos_token_ids)
    template = ChatTemplate.load(bundle.path, generation) if CHAT_TEMPLATE in bundle.manifest.files else None
    model = bundle.manifest.model
    stage_tokens = StageTokens.load(bundle.path, model.image)
    processor = Processor(model, tokenizer, template, stage_tokens=stage_tokens)  # as the runtime makes it
    ids = _question_ids(processor, tokenizer, context)
    prompts = list(ids.values())
    most = min(_TOKENS, context - max(map(len, prompts)))
    with quiet_transformers():
        tokens, logits = greedy_answers(reference.model, prompts, most, stops)
        if not _same_alone(reference.model, prompts, tokens, logits):
            logits = [scores(reference.model, [p], [t])[0] for p, t in zip(prompts, tokens, strict=True)]
    answered = [Answered(q, (), i, t, rows) for (q, i), t, rows in zip(ids.items(), tokens, logits, strict=True)]
    if picture is not None and bundle.manifest.model.image is not None:
        answered.append(_about_picture(reference, processor, picture, stops))
    shown = next((a for a in answered if tokenizer.decode(a.tokens).strip()), answered[0])
    return References(tuple(answered), shown, reference.model, reference.encoded)


def measure(references: References, folder: Path, target: str = "cpu") -> Loss:
    """The loss of the bundle in `folder`, its graphs for `target` on ONNX Runtime's CPU provider. What 8 bits would
    cost is measured where the loss is one that people notice."""
    shown = references.shown
    with VLM(Bundle.load(folder), OnnxRuntimeCpu(target=target)) as vlm:
        found = [_score(vlm, a, references.encoded) for a in references.answered]
        prompt = vlm.processor.process(shown.question, shown.images)
        encoded = encoded_once(vlm, prompt, shown.images, references.encoded)
        (after,) = vlm.greedy([encoded], len(shown.tokens))
        answers = [_text(vlm, tokens) for tokens in (shown.tokens, after)]
    kl, agreement = compared([a.logits for a in references.answered], found)
    texts, _ = compared([a.logits for a in references.texts], found[: len(references.texts)])
    eight = references.rounding(8) if not kl < WARN_KL else (None, None)
    return Loss(
        kl=kl,
        agreement=agreement,
        positions=sum(len(a.tokens) for a in references.answered),
        kl_8_bits=eight[0],
        agreement_8_bits=eight[1],
        question=shown.question,
        answer_before=answers[0],
        answer_after=answers[1],
        kl_texts=texts,
    )


def turns_of(answered: Sequence[Answered], count: int) -> Asked:
    """`count` of the source's answers about no pictures, for measuring what layers cost."""

    def turns(vlm: VLM) -> list[Turn]:
        prompts = [vlm.processor.process(a.question) for a in answered[:count]]
        return [Turn(p, vlm.encode(p), a.tokens) for p, a in zip(prompts, answered, strict=False)]

    return turns


def encoded_once(vlm: VLM, prompt: Prompt, images: Sequence[Any], known: dict[tuple[Any, ...], Encoded]) -> Encoded:
    """The prompt as the decoder gets it; those with pictures are kept in `known`, by the pictures and the files that
    see them: bundles that are compared often differ in the decoder alone."""
    found = known.get(_view(vlm, prompt, images))
    if found is None:
        found = vlm.encode(prompt)
        keep_encoded(vlm, prompt, images, found, known)
    return found


def keep_encoded(
    vlm: VLM, prompt: Prompt, images: Sequence[Any], encoded: Encoded | None, known: dict[tuple[Any, ...], Encoded]
) -> None:
    """Keep what `encoded_once` would make."""
    if images and encoded is not None:
        known[_view(vlm, prompt, images)] = encoded


def _view(vlm: VLM, prompt: Prompt, images: Sequence[Any]) -> tuple[Any, ...]:
    return (prompt.text, *map(id, images), *_seen_by(vlm.bundle, vlm.backend.target))


def _same_alone(model: Any, prompts: Sequence[np.ndarray], tokens: Sequence[np.ndarray], logits: Any) -> bool:
    """Whether the shortest prompt has these logits without the padding that it got beside longer ones; padding is
    exact for rotary positions, not for learned ones."""
    i = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    (alone,) = scores(model, [prompts[i]], [tokens[i]])
    return bool(np.abs(alone - logits[i]).max() <= _SAME * np.ptp(alone))


def _question_ids(processor: Processor, tokenizer: Tokenizer, context: int) -> dict[str, np.ndarray]:
    """The questions that the tokenizer has words for and the context room, and their ids [S]."""
    try:
        ids = {question: processor.process(question).token_ids for question in QUESTIONS}
    except MllmEdgeError as e:
        raise AccuracyError(f"the built-in questions cannot be asked: {e.message}", e.fix) from e
    ids = {question: row for question, row in ids.items() if _survives(question, tokenizer.decode(row))}
    if not ids:
        raise AccuracyError("the tokenizer has no tokens for the words of the built-in questions", _BY_HAND)
    ids = {question: row for question, row in ids.items() if len(row) + _FEWEST <= context}
    if not ids:
        raise AccuracyError(f"a context of {context} tokens holds none of the built-in questions", _BY_HAND)
    return ids


def _survives(question: str, decoded: str) -> bool:
    """Whether most words of a question are still there behind its tokens."""
    spelled = question.casefold().split()
    return 2 * sum(word in decoded.casefold() for word in spelled) >= len(spelled)


def _about_picture(reference: Reference, processor: Processor, case: Case, stops: frozenset[int]) -> Answered:
    """What the comparison has computed already: fewer tokens, and no further run of the tower."""
    prompt = processor.process(case.prompt, case.images)
    found = reference.run(case.prompt, case.images, prompt.text)
    ends = np.flatnonzero(np.isin(found["tokens"], sorted(stops)))
    n = int(ends[0]) + 1 if len(ends) else len(found["tokens"])
    return Answered(case.prompt, case.images, prompt.token_ids, found["tokens"][:n], found["logits"][:n])


def _score(vlm: VLM, answered: Answered, known: dict[tuple[Any, ...], Encoded]) -> np.ndarray:
    prompt = vlm.processor.process(answered.question, answered.images)
    return vlm.score(encoded_once(vlm, prompt, answered.images, known), answered.tokens)


def _seen_by(bundle: Bundle, target: str) -> list[str]:
    """Hashes of the files that make a prompt's embeddings of a picture."""
    graphs = [bundle.variant(name, target).file for name in bundle.manifest.components if name != "decoder"]
    names = [*graphs, *(f"{file}.data" for file in graphs), bundle.manifest.model.embedding.file]
    return [bundle.manifest.files[name].sha256 for name in names if name in bundle.manifest.files]


def _text(vlm: VLM, tokens: np.ndarray) -> str:
    return vlm.tokenizer.decode([int(t) for t in tokens if int(t) not in vlm.stop_ids]).strip()
