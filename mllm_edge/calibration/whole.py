"""The whole decoder with other weights: the last word on what calibration found, against plain rounding on samples held
apart; and what rounding costs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.calibrate import held_apart
from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.decide import shipped
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.linears import Layer
from mllm_edge.calibration.recipes import Recipe, precision_of
from mllm_edge.calibration.sensitivity import Recorded, Unit, affordable, answered, measure_ways
from mllm_edge.graph.precision import Precision
from mllm_edge.runtime.backends.base import Backend

__all__ = ["Losses", "against_rounding", "of_rounding"]

Losses = tuple[float, float, float]
_WAYS, _JUDGES = 2, 32
_AS_UNITS = 64  # a decoder whose weights lie in memory twice is for models of up to some three billion parameters


def against_rounding(
    bundle: Bundle,
    backend: Backend,
    feeds: Feeds,
    recipe: Recipe,
    layers: Sequence[Layer],
    findings: Findings,
    folder: Path,
) -> Losses | None:
    """Divergence in nats from the float `bundle`'s next token, over up to 32 of the runs that calibration held
    apart: with the weights of the decoder's `layers` that were found, with those rounded to nearest, and the standard
    error of the difference. `feeds`: of the decoder, as they were recorded.

    None where there is nothing to compare: recipes that raise layers afterwards or give inputs a range, models too
    large to run a few times, no runs held apart, or none that leaves room for an answer.
    """
    names = tuple(findings.errors())
    precisions = {name: precision_of(recipe, "decoder", name) for name in names}
    held = [i for i in range(len(feeds)) if held_apart(i, len(feeds))]
    count = affordable(_WAYS, sum(math.prod(layer.shape) for layer in layers), _JUDGES)
    if not names or not held or not count or recipe.raised is not None:
        return None
    if not all(precision.in_blocks and not precision.rounds_inputs for precision in precisions.values()):
        return None
    stored = {layer.name: layer for layer in layers}

    def found(name: str) -> np.ndarray:
        layer = findings.layer(name)
        weight = None if layer is None else layer.replaced()
        assert weight is not None
        return weight

    def rounded(name: str) -> np.ndarray:
        return shipped(stored[name].read_weight(), precisions[name])

    ways = {"found": found, "rounded": rounded}
    losses = measure_ways(bundle, backend, Recorded(feeds, tuple(held[:count])), Unit("decoder", names), ways, folder)
    one, other = losses["found"][0], losses["rounded"][0]
    if not len(one):
        return None
    return float(one.mean()), float(other.mean()), float((one - other).std() / math.sqrt(len(one)))


def of_rounding(
    bundle: Bundle,
    backend: Backend,
    samples: Sequence[Sample],
    layers: Sequence[Layer],
    precision: Callable[[str], Precision],
    folder: Path,
) -> tuple[float, float] | None:
    """(divergence in nats, agreement of the likeliest token) along the answers of up to eight of `samples`, with the
    decoder's `layers` rounded to nearest in the blocks of their precision by name; None for models too large for that,
    where no layer has blocks, and where no prompt leaves room for an answer."""
    stored = {layer.name: layer for layer in layers if precision(layer.name).in_blocks}
    count = affordable(_AS_UNITS, sum(math.prod(layer.shape) for layer in layers))
    if not stored or not count or not samples:
        return None

    def weight(name: str) -> np.ndarray:
        return shipped(stored[name].read_weight(), precision(name))

    unit, asked = Unit("decoder", tuple(stored)), answered(samples[: 2 * count])
    kl, same = measure_ways(bundle, backend, asked, unit, {"rounded": weight}, folder)["rounded"]
    return (float(kl.mean()), float(same.mean())) if len(kl) else None
