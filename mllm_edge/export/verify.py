"""Parity: the exported graphs, run by the shipping runtime, against the source model in float32.

Same processor inputs, then: vision encoder and connector outputs, prefill logits, the logits of every step along the
reference's greedy tokens, and the greedy tokens themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import ParityError
from mllm_edge.export.reference import adapted, forget_prompts, load_reference, quiet_transformers
from mllm_edge.export.source import Source

__all__ = ["LIMITS", "Parity", "Scope", "source_runner", "verify"]

_STEPS = 16
_SEED = 0

# Relative errors a correct export stays under. float32 differs by rounding of sums only; half and quantized weights by
# their own rounding, which the recipe accepts, while a wrong graph gives errors near 1.
LIMITS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"vision_encoder": 1e-4, "connector": 1e-4, "prefill_logits": 1e-3, "decode_logits": 1e-3},
    "fp16": {"vision_encoder": 2e-2, "connector": 2e-2, "prefill_logits": 2e-2, "decode_logits": 2e-2},
    "int8": {"vision_encoder": 0.25, "connector": 0.25, "prefill_logits": 0.25, "decode_logits": 0.25},
    "int4": {"vision_encoder": 0.25, "connector": 0.25, "prefill_logits": 0.6, "decode_logits": 0.6},
}


@dataclass(frozen=True)
class Scope:
    """How much of the decoder is compared: all of it (None) or its first layers with the head."""

    decoder_layers: int | None


@dataclass(frozen=True)
class Parity:
    """Results. Vision errors are ‖a − b‖/‖b‖; logits errors are max|a − b| over the reference logits' range.

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
    source: Source, folder: Path, recipe: str, scope: Scope, targets: Sequence[str] = ("cpu",)
) -> tuple[Parity, ...]:
    """Compare the bundle in `folder` with its source, for each target on ONNX Runtime's CPU provider.

    Raises ParityError naming each error beyond its limit.
    """
    reference = _Reference(source, scope)
    return tuple(_verify_target(reference, folder, recipe, scope, target) for target in targets)


def _verify_target(reference: "_Reference", folder: Path, recipe: str, scope: Scope, target: str) -> Parity:
    results = [_compare(reference, folder, case, target) for case in _cases()]
    errors = {name: max(r.errors[name] for r in results if name in r.errors) for name in LIMITS[recipe]}
    agreed, total = sum(r.agreed for r in results), sum(r.total for r in results)
    pixels = max(r.pixels for r in results)
    parity = Parity(
        scope="whole" if scope.decoder_layers is None else f"decoder: first {scope.decoder_layers} layers and head",
        samples=len(results),
        pixel_values=pixels,
        errors=errors,
        limits=LIMITS[recipe],
        greedy_tokens=total,
        greedy_agreement=agreed / total,
        notes=reference.notes,
        target=target,
    )
    _check(parity, recipe)
    return parity


@dataclass(frozen=True)
class _Case:
    prompt: str
    images: tuple[Any, ...]


@dataclass(frozen=True)
class _Outcome:
    errors: dict[str, float]
    pixels: float
    agreed: int
    total: int


def _cases() -> list[_Case]:
    """A text-only prompt, one image, and two images of unequal, odd sizes."""
    from PIL import Image

    random = np.random.default_rng(_SEED)

    def image(height: int, width: int) -> Any:
        coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return [
        _Case("Name three colours.", ()),
        _Case("What is in the picture?", (image(240, 320),)),
        _Case("Compare the two pictures.", (image(97, 131), image(180, 77))),
    ]


class _Reference:
    """The source model in float32 and its processor."""

    def __init__(self, source: Source, scope: Scope):
        import torch

        from mllm_edge.export.families import family_for

        torch.manual_seed(_SEED)
        self.torch, self.family = torch, family_for(source)
        with quiet_transformers():
            self.processor = self.family.load_processor(source)
            load = getattr(self.family, "load_model", load_reference)
            self.model, self.notes = adapted(load(source, scope.decoder_layers).eval(), source)

    def run(self, text: str, images: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """Inputs, vision outputs, greedy tokens and the logits they came from."""
        torch = self.torch
        inputs = self.processor(text=text, images=list(images) or None, return_tensors="pt")
        forget_prompts(self.model)
        found: dict[str, np.ndarray] = {"input_ids": inputs["input_ids"][0].numpy()}
        with torch.no_grad():
            if images:
                found["pixel_values"] = inputs["pixel_values"].numpy()
                hidden, features = self.family.image_features(self.model, inputs)
                found["vision_hidden"], found["image_features"] = hidden.numpy(), features.numpy()
            found.update(self._greedy(inputs))
        return found

    def _greedy(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits, tokens = [], []
        for _ in range(_STEPS):
            logits.append(out.logits[0, -1].numpy())
            tokens.append(int(out.logits[0, -1].argmax()))
            token = self.torch.tensor([[tokens[-1]]])
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return {"logits": np.stack(logits), "tokens": np.array(tokens)}


def _compare(reference: _Reference, folder: Path, case: _Case, target: str) -> _Outcome:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
    from mllm_edge.runtime.vlm import VLM

    with VLM(Bundle.load(folder), OnnxRuntimeCpu(target=target)) as vlm:
        prompt = vlm.processor.process(case.prompt, case.images)
        expected = reference.run(prompt.text, case.images)
        if not np.array_equal(prompt.token_ids, expected["input_ids"]):
            raise ParityError(f"token ids differ from the source's processor for {case.prompt!r}")
        errors, pixels = {}, 0.0
        if prompt.pixel_values is not None:
            pixels = _grey_levels(vlm, prompt.pixel_values, expected["pixel_values"])
            hidden, features = (np.concatenate(parts) for parts in zip(*vlm.vision_runs(prompt), strict=True))
            errors["vision_encoder"] = _relative(hidden, expected["vision_hidden"])
            errors["connector"] = _relative(features, expected["image_features"])
        logits = _forced(vlm, prompt, expected["tokens"])
    spread = np.ptp(expected["logits"])
    difference = np.abs(logits - expected["logits"]).max(axis=1) / spread
    errors["prefill_logits"], errors["decode_logits"] = float(difference[0]), float(difference[1:].max())
    agreed = int((logits.argmax(axis=1) == expected["tokens"]).sum())
    return _Outcome(errors, pixels, agreed, len(logits))


def _grey_levels(vlm: Any, ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of pixel values, which the reference may keep in another shape, in grey levels of 255."""
    if ours.size != expected.size:
        raise ParityError(f"pixel_values {list(ours.shape)}, but {list(expected.shape)} from the source's processor")
    scale = 255 * float(np.mean(_std(vlm)))
    return float(np.abs(ours - expected.reshape(ours.shape)).max()) * scale


def _forced(vlm: Any, prompt: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [steps, V] of prefill and of each step along the reference's tokens."""
    embeds = vlm.prompt_embeds(prompt)
    vlm.decoder.reset(len(embeds) + len(tokens))
    rows = [vlm.decoder.forward(embeds, prompt.positions).copy()]
    for token in tokens[:-1]:
        rows.append(vlm.decoder.forward(vlm.embed(np.array([token]))).copy())
    return np.stack(rows)


def _relative(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def _std(vlm: Any) -> tuple[float, ...]:
    image = vlm.spec.image
    return next((t.std for t in image.transforms if t.op == "normalize"), (1.0,)) if image else (1.0,)


def _check(parity: Parity, recipe: str) -> None:
    beyond = [
        f"{n} {parity.errors[n]:.2g} > {limit:g}" for n, limit in parity.limits.items() if not parity.errors[n] <= limit
    ]
    if parity.pixel_values > 1.0:
        beyond.append(f"pixel_values differ by {parity.pixel_values:.2f} grey levels")
    if recipe == "fp32" and parity.greedy_agreement < 1.0:
        beyond.append(f"greedy tokens agree in {parity.greedy_agreement:.1%} only")
    if beyond:
        raise ParityError(
            f"the exported graphs for {parity.target} disagree with the source model: {'; '.join(beyond)}",
            "please report this with the model's name; --verify off writes the bundle all the same",
        )


def source_runner(source: Source) -> Callable[[str, tuple[Any, ...]], dict[str, np.ndarray]]:
    """Load the source model, whole. The function returned takes a rendered prompt and its images, and gives `input_ids`
    [S], `logits` [steps, V] and greedy `tokens` [steps], with images `vision_hidden` and `image_features`, too."""
    return _Reference(source, Scope(None)).run
