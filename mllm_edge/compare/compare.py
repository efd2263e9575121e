"""Two bundles of one model beside each other: errors of each component, of the logits, and of what is chosen.

The first one's greedy tokens lead; both sides are fed the same tokens, so that errors don't grow by different choices.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import TOKENIZER, Bundle
from mllm_edge.compare.cases import Case, fitting, synthetic_cases
from mllm_edge.compare.metrics import divergence
from mllm_edge.compare.outputs import LOGITS, Outputs, bundle_outputs, errors_of, in_order
from mllm_edge.errors import BundleError
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.vlm import VLM

__all__ = ["TOLERANCES", "Comparison", "compare", "recipe_tolerance", "summarize"]

# Largest error of the logits, relative to their range, that a correct export by this recipe may have.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.25, "int4": 0.6}


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
        return all(self.errors[name] <= self.tolerance for name in LOGITS)

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**data, "cases": list(self.cases), "errors": dict(self.errors), "within": self.within}


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
    model = bundles[0].manifest.model
    chosen = fitting(synthetic_cases(model.image is not None), model) if cases is None else list(cases)
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
        for name, error in errors_of(a, b).items():
            errors[name] = float(np.maximum(errors.get(name, 0.0), error))  # a NaN stays
        divergences.append(divergence(a.logits, b.logits))
        agreed.append(b.logits.argmax(axis=1) == a.tokens)
    every = np.concatenate(agreed)
    return Comparison(
        reference=reference,
        other=other,
        cases=tuple(case.description for case in cases),
        errors=in_order(errors),
        kl=float(np.concatenate(divergences).mean()),
        greedy_tokens=len(every),
        greedy_agreement=float(every.mean()),
        tolerance=tolerance,
        target=target,
    )


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


def _advance(outputs: Outputs, progress: Callable[[int], None]) -> Outputs:
    progress(1)
    return outputs
