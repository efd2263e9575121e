"""Mixed precision: what costs most to round keeps more bits, as much of it as a size allows or an accuracy demands."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mllm_edge.calibration.recipes import HEAD, Recipe, Rule, precision_of
from mllm_edge.graph.precision import BLOCKS_8, HEAD_8, Precision, block_size
from mllm_edge.spec import Role

__all__ = [
    "Candidate",
    "bits_a_weight",
    "by_loss",
    "by_size",
    "eight_bits",
    "ranked",
    "spread",
    "together",
    "weight_bytes",
    "with_small_head",
]

_SCALE_BYTES = 4
# Of a decoder, in which layers of one kind are measured together: what costs most lies in few of them. In thirds,
# SmolLM2-135M's rest cost an eighth more at 5.3 bits a weight.
_PARTS = 6
# Block → part of the loss that blocks of 32 leave: of normally distributed weights' squared error, when they are only
# rounded. Calibration makes up for more of what larger blocks lose: counted so, SmolLM2-135M lost a tenth more at 5.3
# bits.
_FINER_ROUNDED, _FINER = {128: 0.56, 64: 0.74}, {128: 0.7, 64: 0.8}
# Each array in a file of weights begins on one, see `export/datafile.py`.
_PAGE = 4096


@dataclass(frozen=True)
class Candidate:
    """Layers (name → weight [out, in]) that share an input, and what rounding them alone costs: the divergence of the
    next token's distribution in nats, or another measure where that one was not taken."""

    component: str
    layers: tuple[tuple[str, tuple[int, int]], ...]
    loss: float
    role: Role = "text"


def ranked(recipe: Recipe, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates by what a byte spent on their `raised` precision saves, most first."""
    return sorted(candidates, key=lambda c: c.loss / max(_cost(recipe, c), 1.0), reverse=True)


def by_size(recipe: Recipe, room: float, order: Sequence[Candidate]) -> Recipe:
    """`recipe` with its `raised` precision for the first in `order`, while all together take at most `room` bytes."""
    held, chosen = sum(_bytes(recipe, candidate) for candidate in order), []
    for candidate in order:
        if held + _cost(recipe, candidate) <= room:
            held += _cost(recipe, candidate)
            chosen.append(candidate)
    return _raise(recipe, chosen)


def by_loss(recipe: Recipe, most: float, order: Sequence[Candidate]) -> tuple[Recipe, float]:
    """`recipe` with its `raised` precision for the first in `order`, until the losses of the others sum to at most
    `most`; and that sum. Errors of different layers hardly correlate: their divergences add up."""
    left, chosen = sum(candidate.loss for candidate in order), []
    for candidate in order:
        if left <= most:
            break
        left -= candidate.loss
        chosen.append(candidate)
    return _raise(recipe, chosen), max(left, 0.0) if len(chosen) < len(order) else 0.0


def with_small_head(recipe: Recipe) -> Recipe:
    """`recipe` with the projection onto the vocabulary in as few bits as the decoder's layers, four at least: of
    small models it is a fifth to a half, and costs less for its size than any other part."""
    if recipe.head != HEAD_8:
        return recipe
    method = "gptq" if recipe.decoder.needs_data else recipe.decoder.method  # factors would need a place to go
    return replace(recipe, head=replace(HEAD_8, bits=max(recipe.decoder.bits, 4), method=method))


def together(names: Iterable[str]) -> list[tuple[str, ...]]:
    """A decoder's layers that are measured, and get their bits, together: those of one kind in a sixth of the stack."""
    names = list(names)
    stack = 1 + max((int(i) for i in map(_number, names) if i is not None), default=0)
    units: dict[tuple[str, int], list[str]] = {}
    for name in names:
        number = _number(name)
        part = 0 if number is None else int(number) * _PARTS // stack
        units.setdefault((name.rsplit(".", 1)[-1], part), []).append(name)
    return [tuple(unit) for unit in units.values()]


def spread(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    losses: Mapping[tuple[str, ...], float],
    most_loss: float,
    most_bits: float,
) -> Recipe:
    """`recipe` with blocks of 32 or 8 bits for those of the decoder's layers where a byte more saves most, until the
    losses of all sum to at most `most_loss`, as far as they take no more than `most_bits` a weight.

    `shapes`: [out, in] by layer; `losses`: what rounding the layers of a unit alone costs, in nats. They add up: on
    trained decoders of 135 and 270 million parameters to 1.00 and 0.74 of what rounding all together costs. The
    recipe's own rules come last, and so before these.
    """
    ways = {unit: [_Way(loss, 0, {}), *_ways(recipe, unit, shapes, loss)] for unit, loss in losses.items()}
    chosen = {unit: found[0] for unit, found in ways.items()}
    room = (most_bits - bits_a_weight(recipe, shapes)) * sum(math.prod(shape) for shape in shapes.values()) / 8
    while sum(way.loss for way in chosen.values()) > most_loss:
        steps = [
            ((now.loss - way.loss) / max(way.nbytes - now.nbytes, 1), unit, way)
            for unit, now in chosen.items()
            for way in ways[unit]
            if way.loss < now.loss and way.nbytes - now.nbytes <= room
        ]
        if not steps:
            break
        _, unit, way = max(steps, key=lambda step: step[0])
        room -= way.nbytes - chosen[unit].nbytes
        chosen[unit] = way
    named = {name: precision for way in chosen.values() for name, precision in way.precisions.items()}
    head = named.pop(HEAD, recipe.head)
    rules = tuple(Rule("decoder", name, precision) for name, precision in named.items())
    return replace(recipe, head=head, rules=(*rules, *recipe.rules), more_bits_above=None, most_bits=None)


def bits_a_weight(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Of all the decoder's layers [out, in] together, head and scales included."""
    nbytes = sum(sum(_arrays(shape, precision_of(recipe, "decoder", name))) for name, shape in shapes.items())
    return 8 * nbytes / sum(math.prod(shape) for shape in shapes.values())


def eight_bits(layer: str) -> Precision:
    """What keeps a layer of the decoder next to exact."""
    return HEAD_8 if layer == HEAD else BLOCKS_8


def weight_bytes(shape: tuple[int, int], precision: Precision) -> int:
    """What a weight [out, in] takes on disk, its scales included."""
    return sum(-(-part // _PAGE) * _PAGE for part in _arrays(shape, precision))


def _arrays(shape: tuple[int, int], precision: Precision) -> tuple[int, int]:
    """Bytes of a weight [out, in] and of its scales."""
    rows, row = shape
    if precision.kind in ("float32", "float16"):
        return rows * row * precision.bits // 8, 0
    if not precision.in_blocks:
        return rows * row, rows * _SCALE_BYTES
    block = block_size(row, precision.largest_block)
    blocks = rows * math.ceil(row / block)
    return blocks * block * max(precision.bits, 4) // 8, blocks * _SCALE_BYTES


def _number(name: str) -> str | None:
    """Of the layer of the stack that a linear layer belongs to."""
    return next((part for part in name.split(".") if part.isdigit()), None)


@dataclass(frozen=True, eq=False)
class _Way:
    """What the layers of a unit could have, the `loss` in nats and the bytes more that come with it."""

    loss: float
    nbytes: int
    precisions: Mapping[str, Precision]


def _ways(recipe: Recipe, unit: Sequence[str], shapes: Mapping[str, tuple[int, int]], loss: float) -> list[_Way]:
    own = {name: precision_of(recipe, "decoder", name) for name in unit}
    least = sum(sum(_arrays(shapes[name], precision)) for name, precision in own.items())
    left = max(_left_by_finer(shapes[name][1], precision) for name, precision in own.items())
    finer = {name: replace(precision, largest_block=32) for name, precision in own.items()}
    eight = {name: eight_bits(name) for name in unit}
    return [
        _Way(lost, sum(sum(_arrays(shapes[name], precision)) for name, precision in found.items()) - least, found)
        for lost, found in ((left * loss, finer), (0.0, eight))
    ]


def _left_by_finer(row: int, precision: Precision) -> float:
    parts = _FINER if precision.needs_data else _FINER_ROUNDED
    return parts.get(block_size(row, precision.largest_block), 1.0)


def _raise(recipe: Recipe, chosen: Sequence[Candidate]) -> Recipe:
    assert recipe.raised is not None, "the recipe raises nothing"
    rules = (Rule(c.component, name, recipe.raised) for c in chosen for name, _ in c.layers)
    return replace(recipe, rules=(*recipe.rules, *rules))


def _bytes(recipe: Recipe, candidate: Candidate) -> float:
    of = partial(precision_of, recipe, candidate.component, role=candidate.role)
    return sum(weight_bytes(shape, of(name)) for name, shape in candidate.layers)


def _cost(recipe: Recipe, candidate: Candidate) -> float:
    """Bytes more in the `raised` precision."""
    assert recipe.raised is not None, "the recipe raises nothing"
    return sum(weight_bytes(shape, recipe.raised) for _, shape in candidate.layers) - _bytes(recipe, candidate)
