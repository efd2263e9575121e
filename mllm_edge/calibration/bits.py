"""How many bits each of a decoder's layers gets: what they cost alone is measured through the shipping runtime."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.decide import shipped
from mllm_edge.calibration.linears import Layer
from mllm_edge.calibration.mixed import bits_a_weight, eight_bits, spread, together, with_small_head
from mllm_edge.calibration.recipes import HEAD, Recipe, precision_of
from mllm_edge.calibration.sensitivity import Asked, Unit, affordable, measure
from mllm_edge.errors import RecipeError
from mllm_edge.runtime.backends.base import Backend

__all__ = ["check_bits", "fits", "measured", "told"]

_LEFT = 0.5  # of the loss that is accepted: what the parts cost alone is known to some tens of percent


def measured(
    bundle: Bundle,
    backend: Backend,
    asked: Callable[[int], Asked],
    recipe: Recipe,
    layers: Sequence[Layer],
    most_loss: float,
    folder: Path,
    progress: Callable[[str, int], Callable[[int], None]],
) -> Recipe:
    """`recipe` with more bits for those of the decoder's `layers` that cost most, see `mixed.spread`: until rounding
    to nearest costs half of `most_loss` nats, in at most the recipe's `most_bits` a weight.

    `bundle`: the float one; `asked(n)` gives n turns to measure on; what was measured is kept in `folder`.
    `progress(stage, units)` returns what is told of each unit. Raises RecipeError where a decoder is too large for
    that.
    """
    small, stored = with_small_head(recipe), {layer.name: layer for layer in layers}
    shapes = {name: layer.shape for name, layer in stored.items()}
    units = together(name for name in shapes if precision_of(small, "decoder", name) == _own(small, name))
    count = affordable(len(units), sum(map(math.prod, shapes.values())))
    if not count:
        raise RecipeError(
            f"recipe {recipe.name}: a decoder of {sum(map(math.prod, shapes.values())) / 1e9:.0f} billion weights is "
            "too large to measure which layers need more bits",
            'more_bits_above = "never", and [[rules]] for the layers that shall have more',
        )

    def rounded(component: str, name: str) -> np.ndarray:
        return shipped(stored[name].read_weight(), precision_of(small, component, name))

    parts = [Unit("decoder", unit) for unit in units]
    advance = progress("measuring what each part of the decoder costs", len(parts))
    losses = measure(bundle, backend, asked(2 * count), parts, rounded, folder, advance)
    most_bits = math.inf if recipe.most_bits is None else recipe.most_bits
    return spread(small, shapes, {unit.layers: losses[unit.key] for unit in parts}, _LEFT * most_loss, most_bits)


def check_bits(recipe: Recipe, layers: Sequence[Layer]) -> None:
    """Raise RecipeError where the decoder's `layers` in the fewest bits take more than the `most_bits` a weight that
    somebody asked for."""
    fewest = bits_a_weight(with_small_head(recipe), {layer.name: layer.shape for layer in layers})
    if recipe.most_bits is not None and recipe.limits_bits and fewest > recipe.most_bits:
        raise RecipeError(
            f"recipe {recipe.name}: most_bits = {recipe.most_bits:g}, and the decoder takes {fewest:.2f} bits a weight "
            f"with {recipe.decoder.bits} bits in every layer, scales included",
            f"most_bits = {math.ceil(100 * fewest) / 100:.2f} or more",
        )


def fits(recipe: Recipe, layers: Sequence[Layer]) -> bool:
    """Whether the decoder's `layers` take no more than the recipe's `most_bits` a weight as it is."""
    shapes = {layer.name: layer.shape for layer in layers}
    return recipe.most_bits is None or bits_a_weight(recipe, shapes) <= recipe.most_bits


def told(recipe: Recipe, layers: Sequence[Layer]) -> str:
    """How many layers have more bits, in words."""
    shapes = {layer.name: layer.shape for layer in layers}
    found = {name: precision_of(recipe, "decoder", name) for name in shapes}
    kept = sum(precision == eight_bits(name) for name, precision in found.items())
    finer = sum(precision.largest_block == 32 and precision.fewer_than_8 for precision in found.values())
    counts = {"keep 8 bits": kept, "have blocks of 32": finer}
    words = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    size = f"{bits_a_weight(recipe, shapes):.2f} bits a weight"
    if not words:
        return f"all of the decoder's {len(shapes)} layers have {recipe.decoder.bits} bits, the head too ({size})"
    return f"of the decoder's {len(shapes)} layers those that cost most have more bits: {words} ({size})"


def _own(recipe: Recipe, name: str) -> object:
    """The precision that no rule changed."""
    return recipe.head if name == HEAD else recipe.decoder
