"""What a call needs of memory on the CPU, from the graphs of a bundle and sizes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.runtime.limits import PREFILL_CHUNK
from mllm_edge.runtime.onnx_file.cost import Graph, read_graph
from mllm_edge.runtime.planning.activations import arena_bytes
from mllm_edge.runtime.planning.cache import cache_bytes
from mllm_edge.runtime.planning.shapes import crossed, crossed_bytes, stage_runs
from mllm_edge.runtime.planning.weights import weights_of
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.spec import DECODER, DEEPSTACK, ImageSpec, Variant

__all__ = ["FIRST_USE", "MemoryModel", "PlannedMemory"]

# What the libraries take when they are used for the first time, pages of their code above all, as measured on Linux
# with ONNX Runtime 1.32: answers of bundles of a few KB leave a process so much larger than its imports did.
FIRST_USE = 15 << 20


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes of a process that loads a bundle and makes one call on the CPU. `base`: of the process before, its
    libraries and the tokenizer, once they were used; `weights` as the engine keeps them, and `opening`, which it needs
    beside them for a moment; `images`: pictures as they are decoded and as pixel values; `vision` and `prefill`: what
    the stages before the decoder and the decoder work in; `kv_cache`: what of it is written, and what cross-attention
    looks at."""

    base: int
    weights: int
    opening: int
    images: int
    vision: int
    prefill: int
    kv_cache: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        call = self.images + self.vision + self.prefill + self.kv_cache
        return self.base + self.weights + max(self.opening, call)


class MemoryModel:
    """Predicts the memory of calls of one bundle, with its graphs for one target."""

    def __init__(self, bundle: Bundle, target: str):
        self.model, self._bundle = bundle.manifest.model, bundle
        self._variants = {name: bundle.variant(name, target) for name in bundle.manifest.components}

    def cache_bytes(self, capacity: int, layouts: Sequence[Layout], tokens: int) -> int:
        """What is allocated for a cache of `capacity` tokens, and what cross-attention looks at of images of these
        layouts or a prompt of so many tokens."""
        allocated, _ = cache_bytes(self.model, self._variants[DECODER], capacity, 0)
        return allocated + crossed_bytes(self.model, self._variants, layouts, tokens)

    def predict(
        self,
        tokens: int,
        layouts: Sequence[Layout],
        sizes: Sequence[tuple[Any, ...]],
        new: int,
        capacity: int,
        base: int = 0,
    ) -> PlannedMemory:
        """Of a call with so many tokens of a prompt, images of these layouts and sizes (height, width), `new` tokens of
        the answer, and a cache for `capacity` tokens, in a process that has `base` bytes before."""
        weights = {name: weights_of(graph) for name, graph in self._graphs.items()}
        kept, opening = 0, 0
        for name in self._variants:  # they are opened in this order
            opening = max(opening, kept + weights[name].resident + weights[name].opening)
            kept += weights[name].resident
        begun = self.model.begun(tokens)
        _, held = cache_bytes(self.model, self._variants[DECODER], capacity, begun + new)
        seen = crossed_bytes(self.model, self._variants, layouts, tokens)
        return PlannedMemory(
            base=base,
            weights=kept,
            opening=max(0, opening - kept),
            images=_picture_bytes(self.model.image, layouts, sizes),
            vision=self._vision(layouts, tokens),
            prefill=self._prefill(begun, tokens, new, capacity, crossed(self.model, layouts, tokens)),
            kv_cache=held + seen,
        )

    @cached_property
    def _graphs(self) -> Mapping[str, Graph]:
        return {name: read_graph(self._bundle.listed(variant.file)) for name, variant in self._variants.items()}

    def _vision(self, layouts: Sequence[Layout], tokens: int) -> int:
        """The arenas of the stages, which stay, what they hand on, and the features."""
        found, handed = 0, 0
        for stage in self.model.stages:
            runs = [sizes for sizes, _ in stage_runs(self.model, stage, self._variants, layouts, tokens)]
            if runs:
                found += arena_bytes(self._graphs[stage.component], runs)
                handed += max(_values(self._variants[stage.component], sizes) for sizes in runs)
        features = sum(layout.features for layout in layouts) * self.model.hidden_size * (1 + self._deepstack)
        return found + 4 * (handed + features)

    def _prefill(self, begun: int, tokens: int, new: int, capacity: int, features: int) -> int:
        """The decoder's arena, and what goes in and out: embeddings of the whole prompt and of a piece, and logits."""
        image, runs = self.model.image, list[dict[str, int]]()
        piece = begun if image is not None and image.both_ways == "prompt" else PREFILL_CHUNK
        common = {"batch": 1, "rows": 1, "capacity": capacity, "positions": capacity, "features": max(1, features)}
        for start in range(0, begun, piece):
            end = min(begun, start + piece)
            runs.append({**common, "sequence": end - start, "length": end})
        if new > 1:
            runs.append({**common, "sequence": 1, "length": begun + new})
        variant, largest = self._variants[DECODER], max((run["sequence"] for run in runs), default=0)
        biases = [tensor.shape for tensor in variant.inputs if tensor.name.startswith("attention_bias")]
        rows = (tokens + (begun if begun != tokens else 0)) * (1 + self._deepstack) + largest
        host = self.model.hidden_size * rows + self.model.vocab_size + 2 * capacity * self._rope_width
        host += sum(_product(shape, runs[0]) for shape in biases)
        return arena_bytes(self._graphs[DECODER], runs) + 4 * host

    @property
    def _deepstack(self) -> int:
        return sum(tensor.name.startswith(DEEPSTACK) for tensor in self._variants[DECODER].inputs)

    @property
    def _rope_width(self) -> int:
        return sum(rope.dim // 2 for rope in self.model.positions.ropes)


def _picture_bytes(image: ImageSpec | None, layouts: Sequence[Layout], sizes: Sequence[tuple[Any, ...]]) -> int:
    """Of decoded pictures of these sizes (height, width), and of all that is cut of them, as numbers of 8 bits and in
    float32."""
    if image is None:
        return 0
    values = sum(layout.slices for layout in layouts) * sum(map(math.prod, image.inputs.values()))
    return int(3 * sum(math.prod(size[:3]) for size in sizes)) + 5 * values


def _values(variant: Variant, sizes: Mapping[str, int]) -> int:
    """Of all outputs of a run."""
    return sum(_product(tensor.shape, sizes) for tensor in variant.outputs)


def _product(shape: Sequence[int | str], sizes: Mapping[str, int]) -> int:
    return int(np.prod([size if isinstance(size, int) else sizes.get(size, 1) for size in shape], dtype=np.int64))
