"""Parity: the exported graphs, run by the shipping runtime, against the source model in float32.

Both sides start from the same question and images. Compared are the rendered prompt, its ids and the pixel values; then
vision encoder and connector outputs, prefill logits, the logits of every step along the reference's greedy tokens, and
the greedy tokens themselves. The reference is what transformers itself loads from the folder. The logits of quantized
recipes have no limit here: they are judged by their loss (`loss.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import ParityError, PromptError
from mllm_edge.export.loss import prompt_embeds
from mllm_edge.export.reference import adapted, cache_name, forget_prompts, load_reference, quiet_transformers
from mllm_edge.export.source import Source

__all__ = ["LIMITS", "Parity", "Reference", "Scope", "VerifyCase", "source_runner", "verify"]

_STEPS = 16
_SEED = 0

_ERRORS = ("vision_encoder", "connector", "prefill_logits", "decode_logits")
# Relative errors a correct export stays under. float32 differs by rounding of sums only; half and quantized weights by
# their own rounding, which the recipe accepts, while a wrong graph gives errors near 1.
LIMITS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"vision_encoder": 1e-4, "connector": 1e-4, "prefill_logits": 1e-3, "decode_logits": 1e-3},
    "fp16": {"vision_encoder": 2e-2, "connector": 2e-2, "prefill_logits": 2e-2, "decode_logits": 2e-2},
    "int8": {"vision_encoder": 0.25, "connector": 0.25},
    "int4": {"vision_encoder": 0.25, "connector": 0.25},
}


@dataclass(frozen=True)
class Scope:
    """How much of the decoder is compared: all of it (None) or its first layers with the head."""

    decoder_layers: int | None


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


@dataclass(frozen=True)
class VerifyCase:
    """A question, and images as paths or as Pillow images."""

    prompt: str
    images: tuple[Any, ...] = ()


def verify(
    reference: "Reference",
    folder: Path,
    recipe: str,
    targets: Sequence[str] = ("cpu",),
    cases: Sequence[VerifyCase] = (),
) -> tuple[Parity, ...]:
    """Compare the bundle in `folder` with its source, for each target on ONNX Runtime's CPU provider; on questions
    about made-up pictures, and on `cases` of the user's own.

    Raises ParityError naming what differs, or each error beyond its limit.
    """
    asked = (*reference.cases, *cases)
    return tuple(_verify_target(reference, folder, recipe, target, asked) for target in targets)


def _verify_target(
    reference: "Reference", folder: Path, recipe: str, target: str, cases: Sequence[VerifyCase]
) -> Parity:
    scope, results = reference.scope, [_compare(reference, folder, case, target) for case in cases]
    # A NaN stays one.
    errors = {name: float(np.max([r.errors[name] for r in results if name in r.errors])) for name in _ERRORS}
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
        notes=tuple(reference.notes),
        target=target,
    )
    _check(parity, recipe)
    return parity


@dataclass(frozen=True)
class _Outcome:
    errors: dict[str, float]
    pixels: float
    agreed: int
    total: int


def _cases() -> list[VerifyCase]:
    """A text-only prompt, one image, and two images of unequal, odd sizes."""
    from PIL import Image

    random = np.random.default_rng(_SEED)

    def image(height: int, width: int) -> Any:
        coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return [
        VerifyCase("Name three colours.", ()),
        VerifyCase("What is in the picture?", (image(240, 320),)),
        VerifyCase("Compare the two pictures.", (image(97, 131), image(180, 77))),
    ]


class Reference:
    """The source model in float32 and its processor, as transformers loads them from the folder."""

    def __init__(self, source: Source, scope: Scope):
        import torch

        from mllm_edge.export.families import family_for

        self.scope, self.cases = scope, tuple(_cases())
        self.embeds: dict[tuple[Any, ...], np.ndarray] = {}  # see `loss.prompt_embeds`
        self._runs: dict[tuple[Any, ...], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        torch.manual_seed(_SEED)
        self.torch, self.family = torch, family_for(source)
        with quiet_transformers():
            self.processor = self.family.load_processor(source)
            load = getattr(self.family, "load_model", load_reference)
            model, notes = adapted(load(source, scope.decoder_layers).eval(), source)
        self.model, self.notes = model, list(notes)
        if source.model_type in getattr(self.family, "OWN_READING", ()):
            self._note("transformers has no class for this checkpoint: its reading is our own on both sides")

    def run(self, prompt: str, images: tuple[Any, ...], rendered: str) -> dict[str, Any]:
        """The prompt's text, the inputs, vision outputs, greedy tokens and the logits they came from. `rendered`: our
        own text of the prompt, for templates that transformers cannot render with images. What was run once is kept."""
        key = (prompt, rendered, *map(id, images))
        if key not in self._runs:
            self._runs[key] = images, self._run(prompt, images, rendered)  # while they are kept, their ids are theirs
        return self._runs[key][1]

    def _run(self, prompt: str, images: tuple[Any, ...], rendered: str) -> dict[str, Any]:
        torch = self.torch
        text, inputs = self._inputs(prompt, [_opened(image) for image in images], rendered)
        forget_prompts(self.model)
        found: dict[str, Any] = {"text": text, "input_ids": inputs["input_ids"][0].numpy()}
        with torch.no_grad():
            if images:
                found["pixel_values"] = inputs["pixel_values"].numpy()
                hidden, features = self.family.image_features(self.model, inputs)
                found["vision_hidden"], found["image_features"] = hidden.numpy(), features.numpy()
            found.update(self._greedy(inputs))
        return found

    def _inputs(self, prompt: str, images: list[Any], rendered: str) -> tuple[str, Any]:
        """The rendered prompt and the model's inputs, by transformers' apply_chat_template alone where it can."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        text = self._render(content, prompt, len(images))
        if text is not None:
            messages = [{"role": "user", "content": content if images or self._lists(prompt) else prompt}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            with quiet_transformers():
                return text, self.processor.apply_chat_template(messages, **options)
        self._note("transformers cannot render this chat template with images: the prompt's text is our own")
        bos = self.processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and rendered.startswith(bos) else {}
        return rendered, self.processor(text=rendered, images=images or None, return_tensors="pt", **special)

    def _render(self, content: list[Any], prompt: str, images: int) -> str | None:
        """transformers' text of a question, None where its template has no place for images."""
        if images or self._lists(prompt):
            text = self._apply(content)
            return text if text is not None and text.count(self.processor.image_token) == images else None
        return self._apply(prompt)

    def _lists(self, prompt: str) -> bool:
        """Whether the template renders a list of entries, and not the list's own spelling."""
        text = self._apply([{"type": "text", "text": prompt}])
        return text is not None and prompt in text and "'type'" not in text

    def _apply(self, content: Any) -> str | None:
        try:
            with quiet_transformers():
                text = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
        except Exception:  # a template can fail like any program
            return None
        return str(text)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _greedy(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache, logits, tokens = cache_name(self.model), [], []  # type: str, list[np.ndarray], list[int]
        for _ in range(_STEPS):
            logits.append(out.logits[0, -1].numpy())
            tokens.append(int(out.logits[0, -1].argmax()))
            token = self.torch.tensor([[tokens[-1]]])
            out = self.model(input_ids=token, **{cache: out.past_key_values}, use_cache=True)
        return {"logits": np.stack(logits), "tokens": np.array(tokens)}


def _compare(reference: Reference, folder: Path, case: VerifyCase, target: str) -> _Outcome:
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
    from mllm_edge.runtime.vlm import VLM

    with VLM(Bundle.load(folder), OnnxRuntimeCpu(target=target)) as vlm:
        _require_plain(vlm.processor.spelled(case.prompt), case.prompt)
        prompt = vlm.processor.process(case.prompt, case.images)
        expected = reference.run(case.prompt, case.images, prompt.text)
        _require_same_prompt(prompt, expected, case.prompt)
        errors, pixels = {}, 0.0
        if prompt.pixel_values is not None:
            pixels = _grey_levels(vlm, prompt.pixel_values, expected["pixel_values"])
            hidden, features = (np.concatenate(parts) for parts in zip(*vlm.vision_runs(prompt), strict=True))
            errors["vision_encoder"] = _relative(hidden, expected["vision_hidden"])
            errors["connector"] = _relative(features, expected["image_features"])
        embeds = prompt_embeds(vlm, prompt, case.images, reference.embeds)
        logits = _forced(vlm, prompt, embeds, expected["tokens"])
    spread = np.ptp(expected["logits"])
    difference = np.abs(logits - expected["logits"]).max(axis=1) / spread
    errors["prefill_logits"], errors["decode_logits"] = float(difference[0]), float(difference[1:].max())
    agreed = int((logits.argmax(axis=1) == expected["tokens"]).sum())
    return _Outcome(errors, pixels, agreed, len(logits))


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


def _opened(image: Any) -> Any:
    """A picture as transformers takes it: upright; its processors put transparent ones on white themselves. Of 16-bit
    samples Pillow would keep the lowest 255 levels and call the rest white: they come scaled, as the runtime does."""
    from PIL import Image, ImageOps

    from mllm_edge.runtime.image import load_image

    opened = image if isinstance(image, Image.Image) else ImageOps.exif_transpose(Image.open(image))
    return load_image(image) if opened.mode.startswith(("I", "F")) else opened


def _grey_levels(vlm: Any, ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of pixel values, which the reference may keep in another shape, in grey levels of 255."""
    if ours.size != expected.size:
        raise ParityError(f"pixel_values {list(ours.shape)}, but {list(expected.shape)} from the source's processor")
    scale = 255 * float(np.mean(_std(vlm)))
    return float(np.abs(ours - expected.reshape(ours.shape)).max()) * scale


def _forced(vlm: Any, prompt: Any, embeds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits [steps, V] of prefill and of each step along the reference's tokens."""
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


def source_runner(source: Source) -> Callable[[str, tuple[Any, ...], str], dict[str, Any]]:
    """Load the source model, whole. The function returned takes a question, its images and our own rendered prompt, and
    gives `text`, `input_ids` [S], `logits` [steps, V] and greedy `tokens` [steps], with images `vision_hidden` and
    `image_features`, too."""
    return Reference(source, Scope(None)).run
