"""The decision about one group of layers: factors for their shared input, codes and scales, the input's range."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from mllm_edge.calibration.findings import Findings, LayerFindings
from mllm_edge.calibration.linears import Group, Layer
from mllm_edge.calibration.methods import awq, balance, descent, drift, gptq, smoothquant
from mllm_edge.calibration.methods.ranges import SEARCHED, activation_range
from mllm_edge.calibration.statistics import HeldRows, InputStatistics
from mllm_edge.graph import rtn
from mllm_edge.graph.precision import FLOAT32, Precision, Range, block_size
from mllm_edge.graph.scales import reciprocal, smallest

__all__ = ["Decision", "shipped"]

_ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
_BALANCES = (0.35, 0.5, 0.65)
# Of the error on rows held apart, what making up for drift may leave at most: below 4 bits, and from there on. Small
# gains are of these texts alone: a trained decoder in 4 bits lost a fifth more in the end where 5% of each layer's
# error was gained. The coarser the codes, the more there is to gain.
_GAINS = (0.95, 0.8)
_MIDDLE = 0.3  # of the damping: tried first
_SWEEPS = 4  # of coordinate descent; eight gain 1% more

_ROWS: Literal["rows"] = "rows"  # inputs in 8 bits, each row over the range of its own largest magnitude
Inputs = Range | Literal["rows"] | None
_Codes = tuple[np.ndarray | None, np.ndarray | None, int | None]  # codes, scales, block; None for what stays float


class Decision:
    """What the layers of one group get: factors for their shared input, codes and scales, the input's range."""

    def __init__(
        self,
        group: Group,
        statistics: InputStatistics,
        precision: Callable[[str], Precision],
        row_factors: dict[str, np.ndarray],
        findings: Findings,
    ):
        self._group, self._statistics, self._findings = group, statistics, findings
        self._row_factors, self._held = row_factors, statistics.held
        self._precisions = {layer.name: precision(layer.name) for layer in group.layers}
        self._judges = self._held or _rows_alike(statistics.sample)
        self._exact = {layer.name: self._float_weight(layer) for layer in group.layers}
        self._wanted = {name: self._judges.outputs(weight) for name, weight in self._exact.items()}

    def make(self) -> None:
        """Decide, and add to the findings and to the row factors of the layer before the group."""
        weights = self._compensated()
        factors = self._factors(weights)
        found = self._found(weights, factors)
        if factors is not None and self._is_blocks and self._loss(found) >= 0:
            # No better than rounding on rows that were held apart: do without what was fitted.
            factors = None
            found = self._found(self._exact, None)
        fold = self._group.fold
        if factors is not None and fold is not None:
            if fold.layer:
                self._row_factors[fold.layer] = 1 / factors
            else:
                self._findings.add_fold(self._group.layers[0].name, fold.tensors, 1 / factors)
        for layer in found:
            self._findings.add(layer)

    @property
    def _is_blocks(self) -> bool:
        return all(precision.in_blocks for precision in self._precisions.values())

    def _float_weight(self, layer: Layer) -> np.ndarray:
        """The float weight, with the factors that the group behind it asks for."""
        weight, rows = layer.read_weight(), self._row_factors.get(layer.name)
        return weight if rows is None else weight * rows[:, None]

    def _loss(self, found: Sequence[LayerFindings]) -> float:
        """How much more squared error the layers make than rounding to nearest would."""
        power = {name: self._judges.squared(outputs) for name, outputs in self._wanted.items()}
        return sum((layer.error**2 - layer.nearest_error**2) * power[layer.name] for layer in found)

    def _compensated(self) -> dict[str, np.ndarray]:
        """Weights that make up for the drift of earlier layers, as far as that serves rows that were held apart."""
        exact = self._exact
        names = [name for name in exact if "gptq" in self._precisions[name].method]
        moved = self._statistics.drift if names else None
        if moved is None:
            return exact
        judges, gram = self._held, self._statistics.gram
        gain = _GAINS[min(self._precisions[name].bits for name in names) >= 4]
        together = np.concatenate([exact[name] for name in names])
        best = drift.compensated(together, gram, moved, max(drift.DAMPS)) if judges is None else together
        if judges is not None:
            wanted = np.concatenate([self._wanted[name] for name in names], axis=1)
            plain = judges.error(together, wanted)
            least = gain * plain
            for damp in sorted(drift.DAMPS, key=lambda damp: abs(np.log(damp / _MIDDLE))):
                tried = drift.compensated(together, gram, moved, damp)
                error = judges.error(tried, wanted)
                if error < least:
                    least, best = error, tried
                elif error > (1 + gain) / 2 * plain:
                    break  # less than half of what it takes: the other ways will not do
        ends = np.cumsum([len(exact[name]) for name in names])[:-1]
        return {**exact, **dict(zip(names, np.split(best, ends), strict=True))}

    def _found(self, weights: dict[str, np.ndarray], factors: np.ndarray | None) -> list[LayerFindings]:
        where = self._input_range(list(weights.values()), factors)
        codes = self._all_codes(weights, factors)
        return [self._layer(name, w, factors, where, codes[name]) for name, w in weights.items()]

    def _all_codes(self, weights: Mapping[str, np.ndarray], factors: np.ndarray | None) -> dict[str, _Codes]:
        """By layer; those of one precision together, for they share what comes of the inputs alone."""
        found: dict[str, _Codes] = {}
        for precision in set(self._precisions.values()):
            names = [name for name in weights if self._precisions[name] == precision]
            together = np.concatenate([weights[name] for name in names])
            codes, scales, block = self._codes(together if factors is None else together * factors, precision, factors)
            ends = np.cumsum([len(weights[name]) for name in names])[:-1]
            parts = [[None] * len(names) if a is None else np.split(a, ends) for a in (codes, scales)]
            found |= {name: (c, s, block) for name, c, s in zip(names, *parts, strict=True)}
        return found

    def _factors(self, weights: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Factors [K] of the input, where all layers of the group agree on a method that has them. Layers with more
        bits in their blocks need none, and take what serves the others."""
        fewest = min(precision.bits for precision in self._precisions.values())
        judged = {n: p for n, p in self._precisions.items() if p.bits == fewest or not self._is_blocks}
        first, *others = set(judged.values())
        if self._group.fold is None or others or self._statistics.rows == 0:
            return None
        served = [weights[name] for name in judged]
        if first.method == "smoothquant":
            return self._smoothing(served, first)
        if first.method.startswith("awq"):
            rounded = lambda weight: _nearest(weight, first)  # noqa: E731
            return awq.scaling(served, self._statistics.sample, self._statistics.channel_mean, rounded)
        return None

    def _smoothing(self, weights: Sequence[np.ndarray], precision: Precision) -> np.ndarray | None:
        """SmoothQuant's factors with the exponent that serves the outputs best; None where none does better than 1."""
        found: list[np.ndarray | None] = [
            smoothquant.smoothing(weights, self._statistics.channel_max, a) for a in _ALPHAS
        ]
        if precision.per_token:
            sample = self._statistics.sample
            found += [balance.balancing(weights, sample, a) for a in _BALANCES]
            return min([None, *found], key=lambda factors: self._unseen_error(weights, factors, precision))
        if not precision.is_static:
            return found[len(found) // 2]
        ranges = [activation_range(self._statistics, "minmax", factors) for factors in [None, *found]]
        wanted = self._outputs(weights)
        tried = zip([None, *found], ranges, strict=True)
        errors = [self._error(weights, wanted, factors, where, precision) for factors, where in tried]
        return [None, *found][int(np.argmin(errors))]

    def _input_range(self, weights: Sequence[np.ndarray], factors: np.ndarray | None) -> Range | None:
        """What 8 bits represent of the input: of the ways to choose, the one with the smallest error of the outputs."""
        wanted = [p.ranges for p in self._precisions.values() if p.is_static and p.ranges != "token"]
        if not wanted:
            return None
        methods = SEARCHED if wanted[0] == "search" else (wanted[0],)
        ranges = [activation_range(self._statistics, method, factors) for method in methods]
        if len(ranges) == 1:
            return ranges[0]
        outputs = self._outputs(weights)
        errors = [self._error(weights, outputs, factors, where, FLOAT32) for where in ranges]
        return ranges[int(np.argmin(errors))]

    def _outputs(self, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of the layers, for sampled inputs."""
        sample = self._statistics.sample
        return [sample @ weight.T for weight in weights]

    def _error(
        self,
        weights: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        factors: np.ndarray | None,
        where: Range | None,
        precision: Precision,
    ) -> float:
        """Squared error against the outputs `wanted` for sampled inputs in 8 bits and weights rounded to nearest."""
        sample, total = self._statistics.sample, 0.0
        inputs = _rounded_inputs(sample if factors is None else sample / factors, where)
        for weight, outputs in zip(weights, wanted, strict=True):
            rounded = _nearest(weight if factors is None else weight * factors, precision)
            total += float(np.square(inputs @ rounded.T - outputs).sum(dtype=np.float64))
        return total

    def _unseen_error(self, weights: Sequence[np.ndarray], factors: np.ndarray | None, precision: Precision) -> float:
        """The layers' squared relative errors on the judges' rows, weights rounded to nearest."""
        judges, total = self._judges, 0.0
        inputs = _rounded_inputs(judges.x if factors is None else judges.x / factors, _ROWS)
        for weight in weights:
            rounded = _nearest(weight if factors is None else weight * factors, precision)
            total += _judged(judges, inputs, rounded, judges.outputs(weight)) ** 2
        return total

    def _layer(
        self,
        name: str,
        weight: np.ndarray,
        factors: np.ndarray | None,
        group_range: Range | None,
        found: _Codes,
    ) -> LayerFindings:
        """`weight`: what is rounded in the place of the float one, to the codes that were `found`."""
        precision, statistics, judges = self._precisions[name], self._statistics, self._judges
        exact, wanted = self._exact[name], self._wanted[name]
        where = group_range if precision.is_static else None
        rounding: Inputs = _ROWS if precision.per_token else where
        scaled = weight if factors is None else weight * factors
        codes, scales, block = found
        chosen = _dequantized(codes, scales, block) if codes is not None else _nearest(scaled, precision)
        inputs = judges.x if factors is None else judges.x / factors
        error = _judged(judges, _rounded_inputs(inputs, rounding), chosen, wanted)
        nearest = _rounded_inputs(judges.x, activation_range(statistics, "minmax") if where else rounding)
        nearest_error = _judged(judges, nearest, shipped(exact, precision), wanted)
        if error >= nearest_error and precision.in_blocks and self._held is not None:
            plain = exact if factors is None else exact * factors
            rounded = _signed_codes(plain, precision)
            if rounded is not None:
                again = _judged(judges, _rounded_inputs(inputs, rounding), _dequantized(*rounded), wanted)
                if again < error:
                    (codes, scales, block), error = rounded, again
        return LayerFindings(
            name=name,
            bits=precision.bits,
            block=block,
            codes=codes,
            scales=scales,
            factors=factors,
            row_factors=self._row_factors.get(name),
            input_range=where,
            error=error,
            nearest_error=nearest_error,
        )

    def _codes(self, weight: np.ndarray, precision: Precision, factors: np.ndarray | None) -> _Codes:
        """Codes, scales and block of a weight after its factors."""
        if precision.kind in ("float32", "float16", "fp8"):
            return None, None, None
        row = weight.shape[1]
        block = block_size(row, precision.largest_block) if precision.in_blocks else None
        whole = block is None or row % block == 0
        if "gptq" in precision.method and self._statistics.rows and whole:
            gram = self._statistics.gram
            gram = gram if factors is None else gram / np.outer(factors, factors)
            codes, scales = gptq.quantize(weight, gram, precision.bits, block)
            if precision.bits < 8:  # of 8 bits' error, that of the inputs is the larger part
                codes, scales = descent.refine(weight, gram, codes, scales, precision.bits, _SWEEPS)
            return codes, scales, block
        if precision.method == "awq" and self._statistics.rows and block is not None and whole:
            sample = self._statistics.sample if factors is None else self._statistics.sample / factors
            scales = awq.clipped_scales(weight, sample, precision.bits, block)
            return _codes_for(weight, scales, precision.bits, block), scales, block
        if block is None:
            codes, channel = rtn.quantize_channels(weight)
            return codes, channel[:, None], None
        codes, scales = rtn.quantize_blocks(weight, precision.bits, block, positive_scales=True)
        centred = codes.astype(np.int16) - (1 << (precision.bits - 1))
        return centred.reshape(len(codes), -1)[:, :row].astype(np.int8), scales, block


def _codes_for(weight: np.ndarray, scales: np.ndarray, bits: int, block: int) -> np.ndarray:
    high = (1 << (bits - 1)) - 1
    inverse = reciprocal(scales)
    return np.clip(np.rint(weight * np.repeat(inverse, block, axis=1)), -high - 1, high).astype(np.int8)


def _dequantized(codes: np.ndarray, scales: np.ndarray | None, block: int | None) -> np.ndarray:
    assert scales is not None
    spread = scales if block is None else np.repeat(scales, block, axis=1)[:, : codes.shape[1]]
    return codes * spread


def _nearest(weight: np.ndarray, precision: Precision) -> np.ndarray:
    """The weight as rounding to nearest would leave it."""
    if precision.kind in ("float32", "float16"):
        return weight
    if precision.kind == "fp8":
        codes, scales = rtn.quantize_fp8(weight)
        return codes.astype(np.float32) * scales[:, None]
    rows, row = weight.shape
    block = block_size(row, precision.largest_block) if precision.in_blocks else row
    if row % block:
        return weight
    grouped = weight.reshape(-1, block)
    scales = np.abs(grouped).max(axis=1) / ((1 << (precision.bits - 1)) - 1)
    return rtn.rounded_blocks(grouped, scales, precision.bits).reshape(rows, row)


def _rounded_inputs(x: np.ndarray, how: Inputs) -> np.ndarray:
    """Inputs as 8 bits represent them, over a range or over each row's own."""
    if how is None:
        return x
    if how == _ROWS:
        steps = np.maximum(np.abs(x).max(axis=-1, keepdims=True), smallest(np.dtype(np.float32))) / 127
        return np.rint(x / steps) * steps
    low, high = how
    scale = max((high - low) / 255, smallest(np.dtype(np.float32)))
    return (np.clip(np.rint(x / scale), np.rint(low / scale), np.rint(high / scale)) * scale).astype(np.float32)


def _judged(judges: HeldRows, inputs: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> float:
    """‖ŷ − y‖/‖y‖ with the judges' inputs as they are computed with."""
    return replace(judges, x=inputs).error(found, wanted)


def _rows_alike(rows: np.ndarray) -> HeldRows:
    """Rows that judge in the place of those held apart, where there are none."""
    return HeldRows(rows, rows, np.ones(len(rows), np.float32))


def shipped(weight: np.ndarray, precision: Precision) -> np.ndarray:
    """The weight as a recipe without data leaves it."""
    rounded = _signed_codes(weight, precision) if precision.in_blocks else None
    return _nearest(weight, precision) if rounded is None else _dequantized(*rounded)


def _signed_codes(weight: np.ndarray, precision: Precision) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(codes, scales, block) of rounding to nearest, each scale with the sign of its block's peak; None for rows that
    are not whole blocks."""
    row = weight.shape[1]
    block = block_size(row, precision.largest_block)
    if row % block:
        return None
    codes, scales = rtn.quantize_blocks(weight, precision.bits, block)
    centred = codes.astype(np.int16) - (1 << (precision.bits - 1))
    return centred.reshape(len(codes), -1).astype(np.int8), scales, block
