"""Parity: the exported graphs, run by the shipping runtime, against the source model in float32.

Both sides start from the same question and images. Compared are the rendered prompt, its ids and the pixel values; then
vision encoder and connector outputs, prefill logits, the logits of every step along the reference's greedy tokens, and
the greedy tokens themselves. The reference is what transformers itself loads from the folder. Quantized bundles have no
limits here: their graphs are compared in float32, and they are judged by their loss (`loss.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.compare.cases import Case, fitting, synthetic_frames
from mllm_edge.compare.metrics import relative_error
from mllm_edge.compare.outputs import LOGITS, bundle_outputs, errors_of, in_order, named_outputs, seen
from mllm_edge.errors import ParityError, PromptError
from mllm_edge.export.loss import keep_encoded
from mllm_edge.export.source_model import Reference, source_outputs
from mllm_edge.runtime.prompt.sources import Video

__all__ = ["Parity", "limits_of", "verify"]

# Relative errors that a correct export stays under: float32 differs by rounding of sums only, half precision by that of
# values. What quantized weights cost is no error of the graph, which is compared in float32, too.
_COMPONENT, _LOGITS = {"fp32": 1e-4, "fp16": 2e-2}, {"fp32": 1e-3, "fp16": 2e-2}


@dataclass(frozen=True)
class Parity:
    """Results. Vision errors are ‖a − b‖/‖b‖; logits errors are max|a − b| over the reference logits' range; not all
    have a limit.

    `pixel_values` is the largest difference of the processors' outputs, in grey levels of 255.
    """

    scope: str
    samples: int
    pixel_values: float
    errors: Mapping[str, float]
    limits: Mapping[str, float]
    greedy_tokens: int
    greedy_agreement: float
    notes: tuple[str, ...] = field(default_factory=tuple)
    target: str = "cpu"


def verify(
    reference: Reference,
    folder: Path,
    recipe: str,
    targets: Sequence[str] = ("cpu",),
    cases: Sequence[Case] = (),
) -> tuple[Parity, ...]:
    """Compare the bundle in `folder` with its source, for each target on ONNX Runtime's CPU provider; on questions
    about made-up pictures, and on `cases` of the user's own.

    Raises ParityError naming what differs, or each error beyond its limit.
    """
    from mllm_edge.bundle import Bundle

    asked = (*fitting(reference.cases, Bundle.load(folder).manifest.model), *cases)
    return tuple(_verify_target(reference, folder, recipe, target, asked) for target in targets)


def _verify_target(reference: Reference, folder: Path, recipe: str, target: str, cases: Sequence[Case]) -> Parity:
    scope, results = reference.scope, [_compare(reference, folder, case, target) for case in cases]
    found = [*(r.errors for r in results), _video_errors(reference, folder, target)]
    # A NaN stays one.
    names = dict.fromkeys(name for errors in found for name in errors)
    errors = in_order({name: float(np.max([errors[name] for errors in found if name in errors])) for name in names})
    agreed, total = sum(r.agreed for r in results), sum(r.total for r in results)
    pixels = max(r.pixels for r in results)
    parity = Parity(
        scope="whole" if scope.decoder_layers is None else f"decoder: first {scope.decoder_layers} layers and head",
        samples=len(results),
        pixel_values=pixels,
        errors=errors,
        limits=limits_of(recipe, errors),
        greedy_tokens=total,
        greedy_agreement=agreed / total,
        notes=tuple(reference.notes),
        target=target,
    )
    _check(parity, recipe)
    return parity


def limits_of(recipe: str, errors: Iterable[str]) -> dict[str, float]:
    """The largest each error may be; quantized recipes have no such limits."""
    known = {name: (_LOGITS if name in LOGITS else _COMPONENT).get(recipe) for name in errors}
    return {name: limit for name, limit in known.items() if limit is not None}


@dataclass(frozen=True)
class _Outcome:
    errors: dict[str, float]
    pixels: float
    agreed: int
    total: int


def _compare(reference: Reference, folder: Path, case: Case, target: str) -> _Outcome:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
    from mllm_edge.runtime.vlm import VLM

    with VLM(Bundle.load(folder), OnnxRuntimeCpu(target=target)) as vlm:
        _require_plain(vlm.processor.spelled(case.prompt), case.prompt)
        prompt = vlm.processor.process(case.prompt, case.images)
        expected = reference.run(case.prompt, case.images, prompt.text)
        _require_same_prompt(prompt, expected, case.prompt)
        pixels = 0.0
        if prompt.pixel_values is not None:
            pixels = _grey_levels(vlm, prompt.pixel_values, expected["pixel_values"])

        source = source_outputs(vlm.bundle, expected)
        found = bundle_outputs(vlm, case, source.tokens)
        keep_encoded(vlm, prompt, case.images, found.encoded, reference.encoded)
    same = found.tokens == source.tokens
    return _Outcome(errors_of(source, found), pixels, int(same.sum()), len(same))


def _video_errors(reference: Reference, folder: Path, target: str) -> dict[str, float]:
    """Of the components that run for videos, where some run for these alone."""
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
    from mllm_edge.runtime.vlm import VLM

    bundle = Bundle.load(folder)
    if all(stage.shows is None for stage in bundle.manifest.model.stages):
        return {}
    with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
        prompt = vlm.processor.process("What happens?", Video(synthetic_frames()))
        assert prompt.pixel_values is not None
        expected, (_, found) = named_outputs(bundle, reference.video(prompt.pixel_values)), seen(vlm, prompt)
    return {name: relative_error(expected[name], output) for name, output in found.items()}


def _require_plain(spelled: Sequence[str], question: str) -> None:
    if spelled:
        raise PromptError(
            f"the question {question!r:.60} spells {spelled[0]!r}, which stays text here and becomes a token in "
            "transformers: the two cannot be compared",
            "leave it out of --verify-prompt",
        )


def _require_same_prompt(prompt: Any, expected: Mapping[str, Any], question: str) -> None:
    for name, ours, theirs in (
        ("text", prompt.text, expected["text"]),
        ("ids", prompt.token_ids.tolist(), expected["input_ids"].tolist()),
    ):
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ParityError(
                f"the prompt's {name} for {question!r} differ from transformers' at {at}: {ours[at : at + 24]!r}, "
                f"there {theirs[at : at + 24]!r}",
                "please report this with the model's name; --verify off writes the bundle all the same",
            )


def _grey_levels(vlm: Any, ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of pixel values, which the reference may keep in another shape, in grey levels of 255."""
    if ours.size != expected.size:
        raise ParityError(f"pixel_values {list(ours.shape)}, but {list(expected.shape)} from the source's processor")
    scale = 255 * float(np.mean(_std(vlm)))
    return float(np.abs(ours - expected.reshape(ours.shape)).max()) * scale


def _std(vlm: Any) -> tuple[float, ...]:
    image = vlm.spec.image
    return next((t.std for t in image.transforms if t.op == "normalize"), (1.0,)) if image else (1.0,)


def _check(parity: Parity, recipe: str) -> None:
    beyond = [
        f"{n} {parity.errors[n]:.2g} > {limit:g}" for n, limit in parity.limits.items() if not parity.errors[n] <= limit
    ]
    beyond += [f"{n} {e}" for n, e in parity.errors.items() if n not in parity.limits and not np.isfinite(e)]
    if parity.pixel_values > 1.0:
        beyond.append(f"pixel_values differ by {parity.pixel_values:.2f} grey levels")
    if recipe == "fp32" and parity.greedy_agreement < 1.0:
        beyond.append(f"greedy tokens agree in {parity.greedy_agreement:.1%} only")
    if beyond:
        raise ParityError(
            f"the exported graphs for {parity.target} disagree with the source model: {'; '.join(beyond)}",
            "please report this with the model's name; --verify off writes the bundle all the same",
        )
