"""The sizes of a run: what the symbols in the shapes of inputs stand for, rounded up so that steps share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.tensorrt_opened import Range
from mllm_edge.spec import TensorSpec

__all__ = ["Rounding", "Sizes", "bounds", "shape_of"]

# Attention spans a multiple of this many positions.
_SPAN = 64


class Sizes:
    """What the symbols of a graph's inputs stand for. `shapes`: of the inputs, as they were told."""

    def __init__(self, file: str, inputs: Mapping[str, TensorSpec], profile: Mapping[str, Range]):
        self._file, self._inputs, self._profile = file, inputs, profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[str, int]]] = {}
        for tensor in inputs.values():
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, str):
                    self._places.setdefault(size, []).append((tensor.name, axis))
        self._found: dict[str, int] = {}
        self._told: dict[str, None] = {}  # in the order of telling

    def tell(self, name: str, shape: tuple[int, ...]) -> None:
        """An input has this shape from now on."""
        self.shapes[name] = shape
        self._told[name] = None

    def read(self) -> dict[str, int]:
        """Symbol → size; raises BackendError for shapes that are not the graph's, or contradict each other."""
        if self._told:
            said = [(symbol, size) for name in self._told for symbol, size in self._symbols(name)]
            changed = {symbol: size for symbol, size in said if self._found.get(symbol) != size}
            for symbol, size in changed.items():
                for name, axis in self._places[symbol]:
                    if self.shapes[name][axis] != size:
                        shape = list(self.shapes[name])
                        raise BackendError(f"{self._file}: {name} is {shape}, the {symbol} of other inputs {size}")
            self._found |= changed
            self._told.clear()
        return self._found

    def suppose(self, symbol: str, size: int) -> None:
        """All inputs with this symbol have changed their shapes alike."""
        self._found[symbol] = size

    def refused(self, name: str, shape: Sequence[int]) -> BackendError:
        """That the engine does not take an input of this shape."""
        smallest, largest = self._profile[name]
        return BackendError(
            f"{self._file}: {name} is {list(shape)}, its engine takes {list(smallest)} to {list(largest)}",
            "`mllm-edge build` with a larger --max-seq, --max-images or --max-batch",
        )

    def too_large(self, sizes: Mapping[str, int]) -> BackendError:
        """Likewise of the first input whose shape with these sizes it does not take."""
        for name, tensor in self._inputs.items():
            shape, (least, most) = shape_of(tensor, sizes), self._profile[name]
            if any(not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return self.refused(name, shape)
        return BackendError(f"{self._file}: its engine takes no inputs of the sizes {dict(sizes)}")

    def _symbols(self, name: str) -> list[tuple[str, int]]:
        wanted, shape = self._inputs[name].shape, self.shapes[name]
        fits = len(wanted) == len(shape)
        if not fits or any(not isinstance(w, str) and w != size for w, size in zip(wanted, shape, strict=True)):
            raise self.refused(name, shape)
        return [(symbol, size) for symbol, size in zip(wanted, shape, strict=True) if isinstance(symbol, str)]


@dataclass(frozen=True)
class Rounding:
    """How the sizes of a decoder's run are rounded up, what is too much being hidden by the mask: each size takes
    TensorRT time when it is new, and a recorded graph has one.

    `kv_mode` as in `Variant`; `capacity` of an in-place cache; `doubling`: the next span is twice as long, for TensorRT
    for RTX, which compiles kernels for each; `widens`: the number of tokens is rounded as well, which recurrent state
    would take for tokens.
    """

    kv_mode: str | None
    capacity: int
    doubling: bool
    widens: bool

    def prefill(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """For runs of many tokens; a past that is appended to stays as it is, but for an empty one: nobody promises
        that kernels take that."""
        if sizes.get("past") == 0:
            return {**sizes, "past": 1, "length": sizes["length"] + 1}
        if self.kv_mode != "in_place" or "length" not in sizes:
            return dict(sizes)
        return {**sizes, "length": self._span(sizes["length"], self.capacity)}

    def decode(self, sizes: Mapping[str, int], room: int) -> dict[str, int]:
        """For runs of few tokens. `room`: rows that can be read from where the past begins (0: no more than it has)."""
        found, tokens = dict(sizes), sizes.get("sequence", 1)
        widens = self.widens and sizes.get("batch") == 1  # what is too much then stands behind the rest
        wide = _power(tokens) if widens else tokens
        if self.kv_mode == "in_place":
            behind = sizes.get("length", self.capacity) + wide - tokens
            if behind > self.capacity:
                wide, behind = tokens, sizes.get("length", self.capacity)
            if "length" in sizes:
                found["length"] = self._span(behind, self.capacity)
        elif "past" in sizes and sizes.get("length") == sizes["past"] + tokens:
            found["past"] = max(1, sizes["past"], self._span(max(1, sizes["past"]), room))
            found["length"] = found["past"] + wide
        else:
            wide = tokens
        if "sequence" in sizes:
            found["sequence"] = wide
        if "rows" in sizes and widens:
            found["rows"] = max(sizes["rows"], min(_power(sizes["rows"]), wide))
        return found

    def _span(self, length: int, most: int) -> int:
        rounded = max(_SPAN, _power(length)) if self.doubling and length else -(-length // _SPAN) * _SPAN
        return min(rounded, most)


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape; -1 for a symbol whose size is not among these."""
    return tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in tensor.shape)


def bounds(inputs: Mapping[str, TensorSpec], ranges: Mapping[str, Range]) -> dict[str, tuple[int, int]]:
    """Symbol → the smallest and the largest size that a profile of these ranges takes."""
    found: dict[str, tuple[int, int]] = {}
    for name, (least, most) in ranges.items():
        for symbol, low, high in zip(inputs[name].shape, least, most, strict=True):
            if isinstance(symbol, str):
                before = found.get(symbol, (low, high))
                found[symbol] = max(before[0], low), min(before[1], high)
    return found


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()
