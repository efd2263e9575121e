"""Mixed precision: the layers whose rounding hurts most keep more bits, as many as a size allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mllm_edge.calibration.recipes import Precision, Recipe, Rule, block_size, precision_of

__all__ = ["Candidate", "raise_worst", "weight_bytes"]

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Candidate:
    """A layer with weight [out, in] and its measured relative error, ‖ŷ − y‖/‖y‖ for sampled inputs."""

    component: str
    layer: str
    shape: tuple[int, int]
    error: float


def raise_worst(recipe: Recipe, room: float, candidates: Sequence[Candidate]) -> Recipe:
    """`recipe` with a rule for each layer that gets its `raised` precision: those with the most squared error per byte
    that it costs to be rid of it, while all candidates together take at most `room` bytes."""
    raised = recipe.raised
    assert raised is not None, "the recipe raises nothing"
    held = sum(weight_bytes(c.shape, precision_of(recipe, c.component, c.layer)) for c in candidates)

    def cost(c: Candidate) -> float:
        return weight_bytes(c.shape, raised) - weight_bytes(c.shape, precision_of(recipe, c.component, c.layer))

    rules = []
    for candidate in sorted(candidates, key=lambda c: c.error**2 / max(cost(c), 1.0), reverse=True):
        if held + cost(candidate) <= room:
            held += cost(candidate)
            rules.append(Rule(candidate.component, candidate.layer, raised))
    return replace(recipe, rules=recipe.rules + tuple(rules))


def weight_bytes(shape: tuple[int, int], precision: Precision) -> float:
    """What a weight [out, in] takes on disk, its scales included."""
    rows, row = shape
    if precision.kind in ("float32", "float16"):
        return rows * row * precision.bits / 8
    if precision.kind != "blocks":
        return rows * (row + _SCALE_BYTES)
    block = block_size(row, precision.largest_block)
    return rows * math.ceil(row / block) * (block * max(precision.bits, 4) / 8 + _SCALE_BYTES)
