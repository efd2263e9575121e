"""Two bundles of one model beside each other: errors of each component, of the logits, and of what is chosen.

The first one's greedy tokens lead; both sides are fed the same tokens, so that errors don't grow by different choices.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.bundle import TOKENIZER, Bundle
from mllm_edge.errors import BundleError, ContextError
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.vlm import VLM

__all__ = [
    "TOLERANCES",
    "Case",
    "Comparison",
    "Outputs",
    "bundle_outputs",
    "compare",
    "recipe_tolerance",
    "summarize",
    "synthetic_cases",
]

# Largest error of the logits, relative to their range, that a correct export by this recipe may have.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.25, "int4": 0.6}
TOKENS = 16
_ERRORS = ("vision_encoder", "connector", "prefill_logits", "decode_logits")  # in the order they run
_SEED = 0


@dataclass(frozen=True, eq=False)
class Case:
    """A question and its images, and the words for it in a report."""

    prompt: str
    images: tuple[Any, ...]
    description: str


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one side made of a case: `token_ids` [S], `logits` [steps, V], `tokens` [steps] (greedy), and with images
    `vision_hidden` and `image_features` (any shape)."""

    token_ids: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    vision_hidden: np.ndarray | None = None
    image_features: np.ndarray | None = None


@dataclass(frozen=True)
class Comparison:
    """`errors`: ‖a − b‖/‖a‖ of components, max|a − b| over the range of a for logits; the worst case. `kl`: mean
    KL divergence of the steps' distributions, in nats. `within`: no logits error is over `tolerance`. `target`: whose
    graphs of the other one were run."""

    reference: str
    other: str
    cases: tuple[str, ...]
    errors: Mapping[str, float]
    kl: float
    greedy_tokens: int
    greedy_agreement: float
    tolerance: float
    target: str = "cpu"

    @property
    def within(self) -> bool:
        """False for errors that are not numbers, too."""
        return all(self.errors[name] <= self.tolerance for name in ("prefill_logits", "decode_logits"))

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "cases": list(self.cases), "errors": dict(self.errors), "within": self.within}


def synthetic_cases(takes_images: bool) -> list[Case]:
    """A question without images and, for models that take them, one with an image and one with two of unequal size."""
    random = np.random.default_rng(_SEED)

    def case(prompt: str, *sizes: tuple[int, int]) -> Case:
        images = tuple(_smooth(random, height, width) for height, width in sizes)
        shown = "".join(f", {width} x {height} px" for height, width in sizes)
        return Case(prompt, images, f"{prompt!r}{shown}")

    cases = [case("Name three colours.")]
    if takes_images:
        cases.append(case("What is in the picture?", (240, 320)))
        cases.append(case("Compare the two pictures.", (97, 131), (180, 77)))
    return cases


def compare(
    first: str | Path,
    second: str | Path,
    cases: Sequence[Case] | None = None,
    *,
    tolerance: float | None = None,
    target: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    progress: Callable[[int], None] = lambda calls: None,
) -> Comparison:
    """Compare the bundle in `second`, by its graphs for `target`, with that in `first`, by those for the cpu; one is
    opened after the other. `progress(1)` after each case.

    Raises BundleError when they cannot be compared, and what `VLM.load` and `VLM.stream` raise. `tolerance` None: that
    of the coarser recipe (TOLERANCES).
    """
    bundles = [Bundle.load(path) for path in (first, second)]
    _check_same_model(*bundles)
    chosen = synthetic_cases(bundles[0].manifest.model.image is not None) if cases is None else list(cases)
    with VLM(bundles[0], open_backend(backend, threads)) as vlm:
        expected = [_advance(bundle_outputs(vlm, case), progress) for case in chosen]
    with VLM(bundles[1], open_backend(backend, threads, target)) as vlm:
        pairs = zip(chosen, expected, strict=True)
        found = [_advance(bundle_outputs(vlm, case, e.tokens), progress) for case, e in pairs]
    limit = max(recipe_tolerance(b) for b in bundles) if tolerance is None else tolerance
    return summarize(str(first), str(second), chosen, expected, found, limit, target)


def recipe_tolerance(bundle: Bundle) -> float:
    """That of the bundle's recipe; of the coarsest for a recipe that has no name here."""
    return TOLERANCES.get(str(bundle.manifest.recipe.get("name")), max(TOLERANCES.values()))


def bundle_outputs(vlm: VLM, case: Case, tokens: np.ndarray | None = None) -> Outputs:
    """Run a case along `tokens` [steps], or along its own greedy ones. Raises ContextError when it does not fit."""
    prompt = vlm.processor.process(case.prompt, case.images)
    steps = min(TOKENS, vlm.context_length - len(prompt.token_ids)) if tokens is None else len(tokens)
    if steps < 2:
        raise ContextError(f"{case.description}: {len(prompt.token_ids)} tokens leave no room", "use a shorter prompt")
    hidden = features = None
    if prompt.pixel_values is not None:
        hidden = next(iter(vlm.stage_outputs(prompt).values()))["vision_hidden"]
    encoded = vlm.encode(prompt)
    if prompt.pixel_values is not None:
        features = encoded.embeds[prompt.image_positions]
    logits = vlm.steps(encoded, vlm.greedy([encoded], steps, stop_ids=())[0] if tokens is None else tokens)
    return Outputs(prompt.token_ids, logits, logits.argmax(axis=1), hidden, features)


def summarize(
    reference: str,
    other: str,
    cases: Sequence[Case],
    expected: Sequence[Outputs],
    found: Sequence[Outputs],
    tolerance: float,
    target: str = "cpu",
) -> Comparison:
    """The worst errors and the mean agreement of all cases; raises BundleError when prompts differ in their tokens."""
    errors: dict[str, float] = {}
    divergences: list[np.ndarray] = []
    agreed: list[np.ndarray] = []
    for case, a, b in zip(cases, expected, found, strict=True):
        if not np.array_equal(a.token_ids, b.token_ids):
            raise BundleError(
                f"{case.description}: {reference} and {other} make different tokens of it",
                "compare exports of one checkpoint",
            )
        for name, error in _errors(a, b).items():
            errors[name] = float(np.maximum(errors.get(name, 0.0), error))  # a NaN stays
        divergences.append(_divergence(a.logits, b.logits))
        agreed.append(b.logits.argmax(axis=1) == a.tokens)
    every = np.concatenate(agreed)
    return Comparison(
        reference=reference,
        other=other,
        cases=tuple(case.description for case in cases),
        errors={name: errors[name] for name in _ERRORS if name in errors},
        kl=float(np.concatenate(divergences).mean()),
        greedy_tokens=len(every),
        greedy_agreement=float(every.mean()),
        tolerance=tolerance,
        target=target,
    )


def _errors(a: Outputs, b: Outputs) -> dict[str, float]:
    errors = {}
    if a.vision_hidden is not None and b.vision_hidden is not None:
        errors["vision_encoder"] = _relative(a.vision_hidden, b.vision_hidden)
    if a.image_features is not None and b.image_features is not None:
        errors["connector"] = _relative(a.image_features, b.image_features)
    difference = np.abs(a.logits - b.logits).max(axis=1) / max(float(np.ptp(a.logits)), 1e-12)
    return {**errors, "prefill_logits": float(difference[0]), "decode_logits": float(difference[1:].max())}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-12))


def _divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(a ‖ b) of each row's distribution, in nats."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (a, b))
    return (np.exp(p) * (p - q)).sum(axis=1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _check_same_model(a: Bundle, b: Bundle) -> None:
    if _tokenizer(a) != _tokenizer(b):
        raise BundleError(f"{a.path} and {b.path} have different tokenizers", "compare exports of one checkpoint")
    for name in ("image", "vocab_size", "hidden_size"):
        if getattr(a.manifest.model, name) != getattr(b.manifest.model, name):
            what = "image processing" if name == "image" else name
            raise BundleError(f"{a.path} and {b.path} differ in {what}", "compare exports of one checkpoint")


def _tokenizer(bundle: Bundle) -> Any:
    """What decides about ids; padding and truncation are switched off in the runtime."""
    data = json.loads(bundle.listed(TOKENIZER).read_text(encoding="utf-8"))
    return {key: value for key, value in data.items() if key not in ("padding", "truncation")}


def _smooth(random: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _advance(outputs: Outputs, progress: Callable[[int], None]) -> Outputs:
    progress(1)
    return outputs
