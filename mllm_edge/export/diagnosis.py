"""What an export of a checkpoint would do, told in seconds: nothing is traced or written, and no weight is read."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mllm_edge.calibration.recipes import Recipe, part_of, recipe
from mllm_edge.errors import MllmEdgeError, SourceError
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source, open_source
from mllm_edge.export.checkpoint.vocabulary import check_generation
from mllm_edge.export.decoders.build import build_cross_kv, build_decoder, build_text_encoder
from mllm_edge.export.early import check_checkpoint
from mllm_edge.export.family import family_for, open_weights, reading, understand
from mllm_edge.export.pipeline import WHOLE_LIMIT, require_all_used
from mllm_edge.export.plan import Plan, TracedComponent
from mllm_edge.graph.datafile import DryFile
from mllm_edge.graph.precision import Precision
from mllm_edge.json_form import to_json

__all__ = ["RECIPES", "Cost", "Diagnosis", "Refusal", "diagnose_checkpoint"]

RECIPES = ("fp32", "fp16", "int8", "int4")
# docs/benchmarks.md, "Export": 14.1 GB of float16 in 46.9 s and 1.14 GB on two cores, without the comparison.
_BYTES_PER_SECOND, _EXPORT_MEMORY, _START_SECONDS = 3.0e8, 1.2e9, 6.0
# Of a token's forward pass in float32 on two cores: the comparison takes 3 prompts and 48 tokens.
_COMPARED_TOKENS, _MULTIPLICATIONS_PER_SECOND = 700, 4e10
_FLOAT_BYTES = {"float32": 4, "float16": 2}
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Refusal:
    """Why the export would stop, and what to do."""

    what: str
    fix: str


@dataclass(frozen=True)
class Cost:
    """Of one recipe for the CPU, in bytes: `bundle` on disk; `run` in memory with a full context (weights and cache);
    `token` read for each token of an answer. `bits` per weight of the decoder, scales included."""

    bundle: int
    run: int
    token: int
    bits: float


@dataclass(frozen=True)
class Diagnosis:
    """`stored`: type of the weights → how many there are. `export_memory` in bytes and `export_seconds` are estimates
    for two cores, with the comparison with the source model."""

    checkpoint: str
    model_type: str
    family: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    stored: Mapping[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    notices: tuple[str, ...] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    export_memory: int | None = None
    export_seconds: float | None = None

    @property
    def exports(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.refusals

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**to_json(self), "exports": self.exports}


class _Refusals:
    """Collects what goes wrong with a checkpoint, each once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.found: dict[str, Refusal] = {}

    def attempt(self, action: Callable[[], _Result]) -> _Result | None:
        try:
            with reading(self._source):
                return action()
        except MllmEdgeError as e:
            self.found.setdefault(e.message, Refusal(e.message, e.fix))
            return None


def diagnose_checkpoint(folder: str | Path, adapters: Sequence[str | Path] = ()) -> Diagnosis:
    """Read the checkpoint in directory `folder`. What stops an export is among the `refusals`, as many of them as can
    be found at once; SourceError is raised only when there is no checkpoint to look at."""
    if not Path(folder).expanduser().is_dir():
        raise SourceError(
            f"{folder}: no such directory", "name the directory of a checkpoint; download a hub model first"
        )
    check_checkpoint(str(Path(folder).expanduser()))
    source = open_source(str(folder), adapters=adapters)
    refusals = _Refusals(source)
    family = refusals.attempt(lambda: family_for(source))
    weights = refusals.attempt(lambda: open_weights(source))
    plan: Plan | None = None
    if family is not None:
        known = family
        if weights is not None:
            read: Weights = weights
            plan = refusals.attempt(lambda: understand(source, read))
        if plan is None:  # a part that can be read by itself may have faults of its own
            refusals.attempt(lambda: known.load_processor(source))
    if plan is None or weights is None:
        return Diagnosis(
            checkpoint=str(folder),
            model_type=source.model_type,
            family=None if family is None else family.name,
            parameters=None if weights is None else weights.parameters,
            stored={} if weights is None else _stored(weights),
            refusals=tuple(refusals.found.values()),
            notices=tuple(source.notices),
        )
    return _planned(str(folder), source, plan, weights, refusals)


def _planned(folder: str, source: Source, plan: Plan, weights: Weights, refusals: _Refusals) -> Diagnosis:
    refusals.attempt(lambda: check_generation(source, plan.texts.generation, plan.model))
    vision = [refusals.attempt(partial(_claim, component, weights)) or (0, 0) for component in plan.traced]
    costs = {name: refusals.attempt(partial(_cost, plan, weights, name, vision)) for name in RECIPES}
    if plan.decoder.table is not None:
        weights.use(plan.decoder.table.tensor, weights.shape(plan.decoder.table.tensor))
    if not refusals.found:  # what was not reached was not used either
        refusals.attempt(lambda: require_all_used(source, plan, weights))
    stored = sum(math.prod(weights.shape(name)) * weights.dtype(name).itemsize for name in weights)
    compared = min(plan.model.parameters, WHOLE_LIMIT)
    return Diagnosis(
        checkpoint=folder,
        model_type=source.model_type,
        family=plan.model.family,
        parameters=plan.model.parameters,
        context_length=plan.model.context_length,
        stored=_stored(weights),
        refusals=tuple(refusals.found.values()),
        notices=tuple(source.notices),
        costs={name: cost for name, cost in costs.items() if cost is not None},
        export_memory=int(_EXPORT_MEMORY + 4 * compared),
        export_seconds=_START_SECONDS
        + stored / _BYTES_PER_SECOND
        + compared * _COMPARED_TOKENS / _MULTIPLICATIONS_PER_SECOND,
    )


def _claim(component: TracedComponent, weights: Weights) -> tuple[int, int]:
    """Claim the component's weights; how many values are in matrices of linear layers, and how many are not."""
    import torch

    with torch.device("meta"):
        module = component.module()
    linear = other = 0
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.dim() == 2 and name.endswith(".weight"):
            linear += parameter.numel()
        else:
            other += parameter.numel()
        if name not in component.derived:
            weights.use(component.prefix + name, tuple(parameter.shape))
    return linear, other


def _cost(plan: Plan, weights: Weights, name: str, vision: Sequence[tuple[int, int]]) -> Cost:
    chosen, embedding, model = recipe(name), plan.model.embedding, plan.model
    decoder, floats = (_decoder_bytes(plan, weights, r) for r in (chosen, recipe("fp32")))
    roles = [part_of(chosen, plan.model.role(c.name)) for c in plan.traced]
    # What is in no linear layer keeps its type: norms, biases, positions, the convolution of patches.
    towers = sum(
        int(linear * _weight_bytes(role) + other * _FLOAT_BYTES.get(role.kind, 4))
        for (linear, other), role in zip(vision, roles, strict=True)
    )
    towers += _cross_bytes(plan, weights, chosen)
    shape = (embedding.rows, plan.model.hidden_size)
    weights.use(plan.embedding, shape)
    return Cost(
        bundle=decoder + towers + 2 * math.prod(shape),
        run=decoder + towers + 4 * sum(spec.values(model.context_length) for spec in model.state),
        token=decoder,
        bits=round(32 * decoder / floats, 1),
    )


def _decoder_bytes(plan: Plan, weights: Weights, chosen: Recipe) -> int:
    sink = DryFile()
    build_decoder(plan.decoder, weights, chosen, sink)
    return sink.nbytes


def _cross_bytes(plan: Plan, weights: Weights, chosen: Recipe) -> int:
    sink = DryFile()
    if plan.decoder.encoder is not None:
        build_text_encoder(plan.decoder.encoder, weights, chosen, sink)
    if plan.decoder.crossed:
        build_cross_kv(plan.decoder, weights, chosen, sink)
    return sink.nbytes


def _weight_bytes(precision: Precision) -> float:
    if precision.kind == "blocks":
        return precision.bits / 8 + 4 / precision.largest_block
    return _FLOAT_BYTES.get(precision.kind, 1)


def _stored(weights: Weights) -> dict[str, int]:
    return dict(Counter(str(weights.dtype(name)) for name in weights))
