"""What a call will take, before it is made: tokens, room in the context, and memory; nothing is run."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.errors import BackendError
from mllm_edge.install import install_hint
from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
from mllm_edge.runtime.limits import CAPACITY_STEP, PREFILL_CHUNK
from mllm_edge.runtime.machine.cpu import rss
from mllm_edge.runtime.onnx_file.cost import Graph, read_graph
from mllm_edge.runtime.planning.activations import arena_bytes
from mllm_edge.runtime.planning.cache import cache_bytes
from mllm_edge.runtime.planning.weights import weights_of
from mllm_edge.runtime.profiling.shapes import crossed, crossed_bytes, stage_runs
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.runtime.prompt.processor import Messages, Processor
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, settings_of, within
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.spec import DECODER, DEEPSTACK, ImageSpec, Variant

__all__ = ["FIRST_USE", "Plan", "PlannedImage", "PlannedMemory", "Planner", "open_planner", "picture_bytes"]

# What the libraries take when they are used for the first time, pages of their code above all, as measured on Linux
# with ONNX Runtime 1.32: answers of bundles of a few KB leave a process so much larger than its imports did.
FIRST_USE = 20 << 20


@dataclass(frozen=True)
class PlannedImage:
    """What an image (or a video) of `size` (height, width; frames before them) becomes: `tokens` of the prompt, `tiles`
    that the vision encoder sees, in a `grid` of (rows, columns), which is one of `cells` where images keep their shape.
    `pixels` (height, width): what is left of the image in the grid. `settings`: those of the model's that were changed
    for the budget, by their names, none where the image keeps it as it is."""

    size: tuple[float, ...]
    tokens: int
    tiles: int
    grid: tuple[int, int]
    cells: bool
    pixels: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Plan:
    """`prompt_tokens`, of which `image_tokens` are of `images`, in their order in the prompt; `max_new_tokens` that the
    answer may have, and the `room` that a context of `context_length` tokens has behind the prompt, below zero where
    the prompt does not fit; `kv_cache_bytes` as they are allocated for both."""

    prompt_tokens: int
    image_tokens: int
    images: tuple[PlannedImage, ...]
    max_new_tokens: int
    room: int
    context_length: int
    kv_cache_bytes: int
    memory: PlannedMemory

    @property
    def fits(self) -> bool:
        """Whether the prompt and one token at least fit into the context."""
        return self.room > 0


def open_planner(bundle: Bundle, target: str = "cpu") -> "Planner":
    """A planner of a bundle that is not opened. The base is this process's, as it is; without the libraries of the
    target's engine, which may not be installed here, where that is not the CPU."""
    generation = bundle.generation()
    template = ChatTemplate.load(bundle.path, generation) if CHAT_TEMPLATE in bundle.manifest.files else None
    tokenizer = Tokenizer.load(bundle.path, generation)
    stage_tokens = StageTokens.load(bundle.path, bundle.manifest.model.image)
    processor = Processor(bundle.manifest.model, tokenizer, template, stage_tokens=stage_tokens)
    with suppress(BackendError):
        import_onnxruntime(install_hint("cpu"))
    return Planner(bundle, target, processor, rss() + FIRST_USE)


class Planner:
    """Plans calls of one bundle, for one target."""

    def __init__(self, bundle: Bundle, target: str, processor: Processor, base: int):
        """`base`: see `PlannedMemory`."""
        self.model, self._processor, self._base = bundle.manifest.model, processor, base
        self._bundle = bundle
        self._variants = {name: bundle.variant(name, target) for name in bundle.manifest.components}

    def plan(
        self,
        messages: Messages,
        sizes: Sequence[tuple[float, ...]],
        max_new_tokens: int,
        context_length: int,
        *,
        raw: bool = False,
        budget: TokenBudget = FREE,
    ) -> Plan:
        """The plan of a call; arguments and errors as of `Processor.count_tokens`, sizes in the order of the prompt."""
        tokens, layouts = self._processor.laid_out(messages, sizes, raw=raw, budget=budget)
        begun = self.model.begun(tokens)
        room = context_length - max(begun, tokens if self.model.text_encoder is None else begun)
        new = max(0, min(max_new_tokens, room))
        capacity = min(-(-(begun + new) // CAPACITY_STEP) * CAPACITY_STEP, max(context_length, begun))
        allocated, _ = cache_bytes(self.model, self._variants[DECODER], capacity, begun + new)
        paired = zip(sizes, layouts, strict=True)
        images = tuple(self._image(size, layout, len(sizes), budget) for size, layout in paired)
        return Plan(
            prompt_tokens=tokens,
            image_tokens=sum(layout.tokens for layout in layouts),
            images=images,
            max_new_tokens=new,
            room=room,
            context_length=context_length,
            kv_cache_bytes=allocated,
            memory=self.memory(tokens, layouts, sizes, new, capacity),
        )

    def memory(
        self, tokens: int, layouts: Sequence[Layout], sizes: Sequence[tuple[float, ...]], new: int, capacity: int
    ) -> PlannedMemory:
        """Of a call with so many tokens of a prompt, images of these layouts and sizes (height, width), `new` tokens of
        the answer, and a cache for `capacity` tokens."""
        weights = {name: weights_of(graph) for name, graph in self._graphs.items()}
        kept, opening = 0, 0
        for name in self._variants:  # they are opened in this order
            opening = max(opening, kept + weights[name].resident + weights[name].opening)
            kept += weights[name].resident
        begun = self.model.begun(tokens)
        _, held = cache_bytes(self.model, self._variants[DECODER], capacity, begun + new)
        seen = crossed_bytes(self.model, self._variants, layouts, tokens)
        return PlannedMemory(
            base=self._base,
            weights=kept,
            opening=max(0, opening - kept),
            images=picture_bytes(self.model.image, layouts, sizes),
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

    def _image(self, size: tuple[float, ...], layout: Layout, images: int, budget: TokenBudget) -> PlannedImage:
        spec = self.model.image
        assert spec is not None
        settings: Mapping[str, Any] = {}
        if len(size) == 2:
            settings = settings_of(spec, within(spec, int(size[0]), int(size[1]), budget, images))
        cells = spec.patches is not None or spec.whole
        parts = layout.grids[0] if len(layout.grids) > 1 else (1, 1)  # tiles of cells
        pixels = layout.rows * parts[0] * spec.height, layout.cols * parts[1] * spec.width
        return PlannedImage(size, layout.tokens, layout.tiles, (layout.rows, layout.cols), cells, pixels, settings)


def picture_bytes(image: ImageSpec | None, layouts: Sequence[Layout], sizes: Sequence[tuple[float, ...]]) -> int:
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
