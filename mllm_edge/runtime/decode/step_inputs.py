"""What a decoder graph wants to know about its tokens besides their embeddings, for each kind of dialect."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mllm_edge.runtime.decode.encoded import REPEATED
from mllm_edge.runtime.decode.masks import RelativeBias, attention_bias
from mllm_edge.runtime.decode.positions import RotaryTable
from mllm_edge.runtime.decode.state import Cache
from mllm_edge.spec import CROSS_BIAS, CROSS_ROWS, DEEPSTACK, ModelSpec, TensorSpec, Variant, is_cross

__all__ = ["Contract", "Step", "contract_for"]


@dataclass(frozen=True)
class Step:
    """New tokens of B sequences: `counts` [B] of them, padded to `tokens`, behind `pasts` [B] others. The rest as in
    `Encoded` and `Decoder.forward`."""

    pasts: np.ndarray
    tokens: int
    counts: np.ndarray
    positions: np.ndarray | None = None
    length: int | None = None
    spans: np.ndarray | None = None


class Contract(Protocol):
    """Tells the graph where the new tokens stand."""

    def reset(self, capacity: int) -> None:
        """The cache has another capacity from now on; nothing is bound any more."""
        ...

    def takes_batch(self, cache: Cache, counts: np.ndarray) -> bool:
        """Whether the next `counts` [B] tokens of all sequences can be one run."""
        ...

    def cross(self, cross_kv: Mapping[str, np.ndarray] | None, batch: int = 1) -> dict[str, np.ndarray]:
        """Inputs for cross-attention, of so many sequences where they see nothing; see `Decoder.set_cross`."""
        ...

    last: Mapping[str, np.ndarray]  # of the inputs in REPEATED, for the tokens to come

    def begin(self, last: Mapping[str, np.ndarray] | None = None) -> None:
        """New sequences begin, or those go on whose `last` this was."""
        ...

    def check(self, per_token: Mapping[str, np.ndarray]) -> None:
        """Raise ValueError for an input that the graph does not have."""
        ...

    def feeds(self, step: Step, per_token: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs that change with the step; of `per_token` see `Encoded`."""
        ...


def contract_for(variant: Variant, model: ModelSpec, table: np.ndarray | None) -> Contract:
    """The contract of the variant's dialect; `table`: relative bias [buckets, heads], None where there is none."""
    return (_Contrib if variant.dialect == "contrib" else _Standard)(variant, model, table)


class _Shared:
    """Ropes, biases and optional inputs: alike in all dialects."""

    def __init__(self, variant: Variant, model: ModelSpec, table: np.ndarray | None):
        self._inputs = {tensor.name: tensor for tensor in variant.inputs}
        self._dtype = np.dtype(self._inputs["inputs_embeds"].dtype)
        positions = model.positions
        self._specs, self._windows = positions.ropes, positions.windows
        self._relative = None if table is None else RelativeBias(table, positions.max_distance)
        self._ropes: list[RotaryTable] = []
        self._features, self._silent = 1, True
        self.last: Mapping[str, np.ndarray] = {}
        self._defaults: tuple[tuple[int, int], dict[str, np.ndarray]] = ((0, 0), {})

    def reset(self, capacity: int) -> None:
        self._ropes = [RotaryTable(spec, capacity, self._dtype) for spec in self._specs]

    def cross(self, cross_kv: Mapping[str, np.ndarray] | None, batch: int = 1) -> dict[str, np.ndarray]:
        names = [name for name in self._inputs if is_cross(name)]
        self._silent = cross_kv is None
        if cross_kv is None:
            # Values of 0 add nothing, whatever the keys are.
            found = {name: np.zeros((batch, *_sizes(self._inputs[name], 1)), self._dtype) for name in names}
        else:
            found = {name: np.ascontiguousarray(cross_kv[name], self._dtype) for name in names}
        found = {name: _fixed(array) for name, array in found.items()}
        self._features = next(iter(found.values())).shape[2] if found else 1
        self.begin()
        return found

    def place(self, step: Step) -> bool:
        """Write the rows of ropes that are not fixed; whether any were."""
        past, changed = int(step.pasts[0]), False
        for rope in self._ropes:
            changed |= rope.place(past, step.tokens, step.positions, step.length)
        return changed

    def biases(self, step: Step) -> dict[str, np.ndarray]:
        """Every `attention_bias` that the graph takes."""
        feeds = {}
        for index, window in enumerate(self._windows):
            name = _numbered("attention_bias", index)
            if name in self._inputs:
                bias = attention_bias(step.pasts, step.tokens, window, step.spans)
                if self._relative is not None:
                    bias = bias + self._relative.behind(step.pasts, step.tokens)
                feeds[name] = bias.astype(self._dtype, copy=False)
        return feeds

    def begin(self, last: Mapping[str, np.ndarray] | None = None) -> None:
        self.last = last or {}
        self._defaults = ((0, 0), {})

    def check(self, per_token: Mapping[str, np.ndarray]) -> None:
        unknown = [name for name in per_token if name not in self._inputs]
        if unknown:
            raise ValueError(f"the decoder has no input {unknown[0]}")

    def optional(self, step: Step, per_token: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Optional inputs: those given, and for the others what the tokens before them had, or what has no effect."""
        given = {name: self._in_shape(name, rows) for name, rows in per_token.items()}
        repeated = {name: given[name][..., -1:, :] for name in REPEATED if name in given}
        if repeated:
            self.last, self._defaults = {**self.last, **repeated}, ((0, 0), {})
        key = (len(step.pasts), step.tokens)
        if self._defaults[0] != key:
            self._defaults = (key, self._neutral(*key))
        return self._defaults[1] | given

    def _in_shape(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows [S, …] of one sequence as the graph takes them; a bias has an axis of heads before its tokens."""
        leading = len(self._inputs[name].shape) - np.ndim(rows)
        return np.asarray(rows, self._dtype).reshape(*[1] * leading, *np.shape(rows))

    def _neutral(self, batch: int, tokens: int) -> dict[str, np.ndarray]:
        feeds = {}
        for name, tensor in self._inputs.items():
            if name.startswith(DEEPSTACK):
                feeds[name] = np.zeros((batch, tokens, *_sizes(tensor, 0)), self._dtype)
        if CROSS_BIAS in self._inputs:
            feeds[CROSS_BIAS] = np.zeros((batch, 1, tokens, self._features), self._dtype)
        if CROSS_ROWS in self._inputs:
            feeds[CROSS_ROWS] = np.full((batch, tokens, 1), 0 if self._silent else 1, self._dtype)
        feeds |= {name: np.repeat(row, tokens, axis=-2) for name, row in self.last.items()}
        return {name: _fixed(array) for name, array in feeds.items()}

    def _same_rows_for_all(self) -> bool:
        return not any(spec.depends_on_length for spec in self._specs)


class _Contrib(_Shared):
    """Lengths as two bound arrays, and the whole rotary tables.

    The operator turns a new token by the row of its place in the cache, whatever position that row was made for: the
    table serves M-RoPE as well.
    """

    def __init__(self, variant: Variant, model: ModelSpec, table: np.ndarray | None):
        super().__init__(variant, model, table)
        self._seqlens, self._total = np.zeros(0, np.int32), np.zeros((), np.int32)

    def reset(self, capacity: int) -> None:
        super().reset(capacity)
        self._seqlens = np.zeros(0, np.int32)

    def takes_batch(self, cache: Cache, counts: np.ndarray) -> bool:
        """GroupQueryAttention takes several tokens of several sequences only when all begin."""
        begins, single = not cache.lengths.any(), bool((counts == 1).all())
        return self._same_rows_for_all() and (begins or single)

    def feeds(self, step: Step, per_token: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds: dict[str, np.ndarray] = {}
        fresh = len(self._seqlens) != len(step.pasts)
        if fresh:
            self._seqlens = np.zeros(len(step.pasts), np.int32)
            feeds |= {"seqlens_k": self._seqlens, "total_sequence_length": self._total}
        self._seqlens[:] = step.pasts + step.counts - 1
        self._total[...] = int((step.pasts + step.counts).max())
        if self.place(step) or fresh:
            for k, rope in enumerate(self._ropes):
                feeds |= {_numbered("cos", k): _fixed(rope.cos), _numbered("sin", k): _fixed(rope.sin)}
        return feeds | self.biases(step) | self.optional(step, per_token)


class _Standard(_Shared):
    """Biases and rotary rows for the new tokens; the places to write at, where the cache is in place."""

    def __init__(self, variant: Variant, model: ModelSpec, table: np.ndarray | None):
        super().__init__(variant, model, table)
        self._writes = "write_indices" in self._inputs

    def takes_batch(self, cache: Cache, counts: np.ndarray) -> bool:
        """Padding is written behind a shorter sequence's tokens: there must be room for it."""
        return self._same_rows_for_all() and cache.length + int(counts.max()) <= cache.capacity

    def feeds(self, step: Step, per_token: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.place(step)
        feeds = self.biases(step)
        for k, rope in enumerate(self._ropes):
            for name, table in (("cos", rope.cos), ("sin", rope.sin)):
                rows = np.stack([table[past : past + step.tokens] for past in step.pasts])
                feeds[_numbered(name, k)] = rows
        if self._writes:
            feeds["write_indices"] = step.pasts
        return feeds | self.optional(step, per_token)


def _fixed(array: np.ndarray) -> np.ndarray:
    """A view that tells the session: the contents stay until another array is given."""
    view = array.view()
    view.flags.writeable = False
    return view


def _numbered(name: str, index: int) -> str:
    return f"{name}.{index}" if index else name


def _sizes(tensor: TensorSpec, symbol: int) -> list[int]:
    """The sizes of all axes but batch, symbols replaced (0: left out)."""
    sizes = [size if isinstance(size, int) else symbol for size in tensor.shape[1:]]
    return [size for size in sizes if size]
