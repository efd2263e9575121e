"""The loss of a bundle against an independent computation with transformers alone."""

import copy as copy_module
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.export import loss
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.loss import References, ask, measure
from mllm_edge.export.loss_questions import QUESTIONS
from mllm_edge.export.reference import before, forget_prompts, linear_layers
from mllm_edge.export.source_model import Reference, Scope
from mllm_edge.graph.precision import block_size
from mllm_edge.runtime.vlm import VLM
from tests.families.row import families_of


@pytest.fixture(scope="module", params=families_of(""))
def asked(
    request: pytest.FixtureRequest, saved: Callable[..., Path], fours: Callable[[str], Path]
) -> tuple[Any, Path, References]:
    """(the source as transformers loads it, an int4 bundle of it, its answers)"""
    reference, bundle = Reference(open_source(str(saved(request.param))), Scope(None)), fours(request.param)
    return reference, bundle, ask(reference, bundle)


def prompt_types(model: Any, text: torch.Tensor, prompt: int) -> dict[str, torch.Tensor]:
    """What transformers' `generate` gives a model whose prompts of so many tokens see each other both ways."""
    if not getattr(model.config.get_text_config(), "use_bidirectional_attention", False):
        return {}
    return {"token_type_ids": (torch.arange(text.shape[1]) >= prompt).long()[None]}


def whole(model: Any, ids: np.ndarray, answer: list[int]) -> np.ndarray:
    """Logits [S, V] of a prompt with an answer, or of the tokens that a decoder begins with and an answer; no cache."""
    forget_prompts(model)
    prompt, said, begun = torch.tensor(ids)[None], torch.tensor([answer], dtype=torch.long), before(model)
    with torch.no_grad():
        if begun:
            begun["decoder_input_ids"] = torch.cat([begun["decoder_input_ids"], said], dim=1)
            return np.array(model(input_ids=prompt, use_cache=False, **begun).logits[0])
        text = torch.cat([prompt, said], dim=1)
        return np.array(model(input_ids=text, use_cache=False, **prompt_types(model, text, len(ids))).logits[0])


def steps(model: Any, ids: np.ndarray, tokens: int) -> np.ndarray:
    """Logits [tokens, V] of greedy steps, each with the whole text before it and no cache."""
    rows = list[np.ndarray]()
    for _ in range(tokens):
        rows.append(whole(model, ids, [int(row.argmax()) for row in rows])[-1])
    return np.stack(rows)


def test_references_are_the_sources_own_greedy_answers(asked: tuple[Any, Path, References]) -> None:
    reference, _, references = asked
    assert [a.question for a in references.answered] == list(QUESTIONS)
    for answered in references.answered[::4]:
        expected = steps(reference.model, answered.ids, len(answered.tokens))
        np.testing.assert_array_equal(answered.tokens, expected.argmax(axis=1))
        np.testing.assert_allclose(answered.logits, expected, atol=1e-4 * np.ptp(expected))
    assert sum(len(a.tokens) for a in references.answered) >= 150  # random answers end at times


def test_padding_that_changes_logits_is_found(
    asked: tuple[Any, Path, References], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, folder, references = asked
    exact = loss.greedy_answers

    def padded(*arguments: Any) -> Any:
        tokens, logits = exact(*arguments)
        return tokens, [rows + 0.1 * np.ptp(rows) * (np.arange(rows.shape[1]) % 2) for rows in logits]

    monkeypatch.setattr(loss, "greedy_answers", padded)
    for a, b in zip(ask(reference, folder).answered, references.answered, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-4 * np.ptp(b.logits))


def bundle_steps(folder: Path, answered: Any) -> np.ndarray:
    """Logits [n, V] of a bundle, token by token along an answer."""
    with VLM.load(folder) as vlm:
        prompt = vlm.processor.process(answered.question, answered.images)
        return vlm.steps(vlm.encode(prompt), answered.tokens)


def compared(expected: list[np.ndarray], found: list[np.ndarray]) -> tuple[float, float]:
    """(mean KL, agreement) by torch."""
    a, b = (torch.tensor(np.concatenate(rows)).double() for rows in (expected, found))
    kl = torch.nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="none").sum(1)
    return float(kl.mean()), float((a.argmax(1) == b.argmax(1)).double().mean())


def test_loss_is_that_of_steps_along_the_sources_answers(asked: tuple[Any, Path, References]) -> None:
    _, folder, references = asked
    measured = measure(references, folder)
    found = [bundle_steps(folder, answered) for answered in references.answered]
    kl, agreement = compared([a.logits for a in references.answered], found)
    assert measured.kl == pytest.approx(kl, rel=0.02)  # prefill and steps quantize activations in other groups
    assert measured.agreement == pytest.approx(agreement, abs=0.02)
    assert measured.positions == sum(len(a.tokens) for a in references.answered)
    first = references.answered[0]
    with VLM.load(folder) as vlm:
        stop = {int(t) for t in first.tokens if int(t) in vlm.stop_ids}
        assert measured.answer_before == vlm.tokenizer.decode([t for t in first.tokens if int(t) not in stop]).strip()
        assert measured.answer_after == vlm.generate(QUESTIONS[0], max_new_tokens=len(first.tokens)).text.strip()
    assert measured.question == QUESTIONS[0]


def in_eight_bits(weight: torch.Tensor, largest: int) -> torch.Tensor:
    """Blocks of a row: the element of largest magnitude becomes -128 times the scale."""
    block = block_size(weight.shape[1], largest)
    grouped = weight.reshape(len(weight), -1, block)
    peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = -peak / 128
    return ((grouped / scale).round().clamp(-128, 127) * scale).reshape(weight.shape)


def test_eight_bits_are_those_of_a_rounded_source(asked: tuple[Any, Path, References]) -> None:
    reference, _, references = asked
    copy = copy_module.deepcopy(reference.model)
    head = copy.get_output_embeddings()
    head.weight = torch.nn.Parameter(in_eight_bits(head.weight, 64))
    for module in linear_layers(copy):
        module.weight = torch.nn.Parameter(in_eight_bits(module.weight, 128))
    found = []
    for answered in references.answered:
        logits = whole(copy, answered.ids, answered.tokens[:-1].tolist())
        found.append(logits[-len(answered.tokens) :])
    kl, agreement = compared([a.logits for a in references.answered], found)
    before = steps(reference.model, references.answered[0].ids, 2)
    assert references.rounding(8) == (pytest.approx(kl, rel=1e-3), pytest.approx(agreement, abs=1e-3))
    np.testing.assert_array_equal(steps(reference.model, references.answered[0].ids, 2), before)  # whole again


def test_files_that_see_alike_run_once(asked: tuple[Any, Path, References], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, folder, _ = asked
    references = ask(reference, folder, reference.cases[1])
    assert references.answered[-1].images
    first = measure(references, folder)
    monkeypatch.setattr("mllm_edge.runtime.encode._image_inputs", None)  # would fail
    assert measure(references, folder) == first
