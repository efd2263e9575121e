"""Columns of a decoder's weights evened out before they are rounded, from the weights alone.

Factors of a layer's columns are taken back by what stands before it: a norm's weights, or the rows of the layer whose
output is multiplied into its input. The function stays the same; the blocks that share a scale become more alike. After
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1, with norms
and gated products in the place of ReLU.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.graph.chunks import for_each_chunk
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, EncoderSpec

__all__ = ["EvenedWeights"]

# Halfway: columns as large as their inputs are small would make those that hardly matter set the scale.
_STRENGTH = 0.5
# Between a group's largest and smallest factor: half precision has to hold what is multiplied and divided by them.
_SPREAD = 64.0
Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Change:
    """What a tensor is multiplied with: each row, each column; `offset` is added to it meanwhile."""

    rows: Read | None = None
    columns: Read | None = None
    offset: float = 0.0


class EvenedWeights:
    """The tensors of a checkpoint as a decoder of `spec` can compute with them, columns evened out."""

    def __init__(self, weights: Weights, spec: DecoderSpec | EncoderSpec):
        self._weights, self._spec = weights, spec
        self._changes: dict[str, list[_Change]] = {}
        pairs = list(_branches(spec))
        # A norm that several branches read would need the factors of all.
        norms = Counter(self._name(i, branch.pre) for i, branch in pairs if branch.pre)
        for i, branch in pairs:
            alone = branch.pre is not None and norms[self._name(i, branch.pre)] == 1
            self._even(i, branch, branch.pre if alone else None)

    def use(self, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        """As `Weights.use`."""
        read, changes = self._weights.use(name, shape), self._changes.get(name, ())

        def changed() -> np.ndarray:
            tensor = read()
            for change in changes:
                tensor = _changed(tensor, change)
            return tensor

        return changed if changes else read

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Weights.shape`."""
        return self._weights.shape(name)

    def _even(self, i: int, branch: Branch, norm: str | None) -> None:
        spec, width, scale = self._spec, self._spec.hidden_size, self._scale(i, norm)
        if branch.kind == "attention":
            rows = {
                "q_proj": spec.attention.heads,
                "k_proj": spec.attention.kv_heads,
                "v_proj": spec.attention.kv_heads,
            }
            layers = {self._name(i, part): (n * spec.attention.head_dim, width) for part, n in rows.items()}
            self._behind_norm(i, norm, layers, scale)
            self._heads(i, scale)
        elif branch.kind == "mlp":
            parts = ("gate_proj", "up_proj") if spec.mlp.gated else ("up_proj",)
            layers = {self._name(i, part): (spec.mlp.inner, width) for part in parts}
            self._behind_norm(i, norm, layers, scale)
            if spec.mlp.gated:
                self._products(self._name(i, "up_proj"), self._name(i, "down_proj"), spec.mlp.inner, scale)
        elif branch.kind == "conv":
            self._behind_norm(i, norm, {self._name(i, f"conv_{part}_proj"): (width, width) for part in "bcx"}, scale)
            # What the gate c is multiplied with is in the state, c itself is not.
            self._products(self._name(i, "conv_c_proj"), self._name(i, "conv_out_proj"), width, scale)
        elif branch.kind == "moe":
            self._experts(i, scale)

    def _behind_norm(self, i: int, norm: str | None, layers: Mapping[str, tuple[int, int]], scale: Read) -> None:
        """Layers (name → shape) that read what a norm returns."""
        if norm is None:
            return
        reads = [self._weights.use(f"{layer}.weight", shape) for layer, shape in layers.items()]
        factors = _once(lambda: _halfway(np.abs(scale()), _columns([read() for read in reads])))
        name = self._name(i, norm)
        self._change(f"{name}.weight", _Change(rows=_inverse(factors), offset=self._spec.norm.offset))
        self._change(f"{name}.bias", _Change(rows=_inverse(factors)))
        for layer in layers:
            self._change(f"{layer}.weight", _Change(columns=factors))

    def _heads(self, i: int, scale: Read) -> None:
        """The output projection, whose inputs are sums of value rows; each of these serves all heads of its group."""
        spec, width = self._spec.attention, self._spec.hidden_size
        value, out = self._name(i, "v_proj"), self._name(i, "o_proj")
        shape = (spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        read_value = self._weights.use(f"{value}.weight", (spec.kv_heads * spec.head_dim, width))
        read_out = self._weights.use(f"{out}.weight", (width, spec.heads * spec.head_dim))

        def found() -> np.ndarray:
            columns = np.square(_columns([read_out()])).reshape(shape).mean(axis=1)
            return _halfway(_rows(read_value(), scale()), np.sqrt(columns).ravel())

        factors = _once(found)
        self._change(f"{value}.weight", _Change(rows=_inverse(factors)))
        self._change(f"{value}.bias", _Change(rows=_inverse(factors)))
        spread = lambda: np.broadcast_to(factors().reshape(shape[0], 1, shape[2]), shape).ravel()  # noqa: E731
        self._change(f"{out}.weight", _Change(columns=spread))

    def _products(self, up: str, down: str, inner: int, scale: Read) -> None:
        """down(act(gate) · up): rows of `up` give what columns of `down` get."""
        width = self._spec.hidden_size
        read_up = self._weights.use(f"{up}.weight", (inner, width))
        read_down = self._weights.use(f"{down}.weight", (width, inner))
        factors = _once(lambda: _halfway(_rows(read_up(), scale()), _columns([read_down()])))
        self._change(f"{up}.weight", _Change(rows=_inverse(factors)))
        self._change(f"{up}.bias", _Change(rows=_inverse(factors)))
        self._change(f"{down}.weight", _Change(columns=factors))

    def _experts(self, i: int, scale: Read) -> None:
        spec = self._spec.moe if isinstance(self._spec, DecoderSpec) else None
        assert spec is not None
        names = self._spec.names.layer
        for e in range(spec.experts):
            up, down = (names[f"expert_{part}_proj"].format(i=i, e=e) for part in ("up", "down"))
            self._products(up, down, spec.inner, scale)
        if spec.shared_inner:
            up, down = (self._name(i, f"shared_{part}_proj") for part in ("up", "down"))
            self._products(up, down, spec.shared_inner, scale)

    def _scale(self, i: int, norm: str | None) -> Read:
        """The magnitudes [H] of what the norm returns, as its weights tell them."""
        width = self._spec.hidden_size
        if norm is None:
            return lambda: np.ones(width, np.float32)
        read = self._weights.use(f"{self._name(i, norm)}.weight", (width,))
        return lambda: read() + np.float32(self._spec.norm.offset)

    def _change(self, tensor: str, change: _Change) -> None:
        self._changes.setdefault(tensor, []).append(change)

    def _name(self, i: int, part: str) -> str:
        return self._spec.names.layer[part].format(i=i)


def _branches(spec: DecoderSpec | EncoderSpec) -> Iterator[tuple[int, Branch]]:
    return ((i, branch) for i, layer in enumerate(spec.stack) for branch in layer.branches)


def _changed(tensor: np.ndarray, change: _Change) -> np.ndarray:
    """The tensor in its own place: it is a copy that nobody else reads."""
    rows = None if change.rows is None else change.rows()
    columns = None if change.columns is None else change.columns()
    if change.offset:
        tensor += np.float32(change.offset)

    def work(start: int, stop: int) -> None:
        part = tensor[start:stop]
        if rows is not None:
            part *= rows[start:stop].reshape(-1, *[1] * (tensor.ndim - 1))
        if columns is not None:
            part *= columns

    for_each_chunk(len(tensor), tensor[0].size, work)
    if change.offset:
        tensor -= np.float32(change.offset)
    return tensor


def _halfway(inputs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Factors [K] ≥ 1 of columns with root mean squares `columns` whose inputs are about `inputs` large: activations
    become smaller, so that half precision holds them. 1 for all where one of the two is zero everywhere."""
    if not inputs.any() or not columns.any():
        return np.ones(len(columns), np.float32)
    ratio = np.maximum(inputs, inputs.max() / _SPREAD) / np.maximum(columns, columns.max() / _SPREAD)
    factors = ratio**_STRENGTH
    return np.minimum(factors / factors.min(), _SPREAD).astype(np.float32)


def _columns(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Root mean square [K] of the columns of all weights [N, K] together."""
    squares = np.zeros(weights[0].shape[1], np.float32)
    for weight in weights:
        parts = dict[int, np.ndarray]()

        def work(start: int, stop: int, of: np.ndarray = weight, into: dict[int, np.ndarray] = parts) -> None:
            into[start] = np.einsum("nk,nk->k", of[start:stop], of[start:stop])

        for_each_chunk(len(weight), weight.shape[1], work)
        for start in sorted(parts):  # whatever thread was first, the sum is the same
            squares += parts[start]
    return np.sqrt(squares / sum(len(weight) for weight in weights))


def _rows(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Norm [N] of a weight's rows for inputs that are `scale` [K] large."""
    norms = np.empty(len(weight), np.float32)

    def work(start: int, stop: int) -> None:
        part = weight[start:stop] * scale
        norms[start:stop] = np.sqrt(np.einsum("nk,nk->n", part, part))

    for_each_chunk(len(weight), weight.shape[1], work)
    return norms


def _inverse(factors: Read) -> Read:
    return lambda: 1 / factors()


def _once(find: Read) -> Read:
    """`find`, called when its result is first needed."""
    found: list[np.ndarray] = []

    def kept() -> np.ndarray:
        if not found:
            found.append(find())
        return found[0]

    return kept
