"""What a call will take, before it is made: tokens, room in the context, and memory; nothing is run."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mllm_edge.bundle import CHAT_TEMPLATE, Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
from mllm_edge.runtime.limits import CAPACITY_STEP
from mllm_edge.runtime.machine.cpu import resident
from mllm_edge.runtime.planning.memory import FIRST_USE, MemoryModel, PlannedMemory
from mllm_edge.runtime.prompt.image import load_image
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.runtime.prompt.processor import Messages, Processor
from mllm_edge.runtime.prompt.sources import EncodedImage, Kind, Source, Video, VideoFile
from mllm_edge.runtime.prompt.stage_text import StageTokens
from mllm_edge.runtime.prompt.timing import timing_of
from mllm_edge.runtime.prompt.token_budget import TokenBudget, settings_of, within
from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
from mllm_edge.spec import FrameSampling

__all__ = ["Plan", "PlannedImage", "Planner", "open_planner", "size_of"]


@dataclass(frozen=True)
class PlannedImage:
    """What an image (or a video) of `size` (height, width; frames before them) becomes: `tokens` of the prompt, `tiles`
    that the vision encoder sees, in a `grid` of (rows, columns), which is one of `cells` where images keep their shape;
    of a video the grid is that of a frame, or of few that are seen as one, and the tiles are of all of them. `pixels`
    (height, width): what is left of the image in the grid. `settings`: those of the model's that were changed
    for the budget, by their names, none where the image keeps it as it is."""

    size: tuple[float, ...]
    tokens: int
    tiles: int
    grid: tuple[int, int]
    cells: bool
    pixels: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


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
        import_onnxruntime()
    return Planner(MemoryModel(bundle, target), processor, resident() + FIRST_USE)


class Planner:
    """Plans calls of one bundle, for one target."""

    def __init__(self, memory: MemoryModel, processor: Processor, base: int):
        """`base`: see `PlannedMemory`."""
        self._memory, self._processor, self._base = memory, processor, base
        self._model = memory.model

    def require(self, kinds: Sequence[Kind]) -> None:
        """Raises PromptError for kinds of which the model takes none, or not so many."""
        self._processor.require(kinds)

    def plan(
        self,
        messages: Messages,
        sizes: Sequence[tuple[Any, ...]],
        budgets: Sequence[TokenBudget],
        max_new_tokens: int,
        context_length: int,
        raw: bool = False,
        files: Collection[int] = (),
    ) -> Plan:
        """The plan of a call; arguments and errors as of `Processor.laid_out`. `files`: the places of videos whose
        frames are decoded one at a time."""
        tokens, order, layouts = self._processor.laid_out(messages, sizes, budgets, raw=raw)
        begun = self._model.begun(tokens)
        room = context_length - (begun if tokens <= context_length else tokens)
        new = max(0, min(max_new_tokens, room))
        capacity = min(-(-(begun + new) // CAPACITY_STEP) * CAPACITY_STEP, max(context_length, begun))
        shown, count = [(sizes[i], budgets[i]) for i in order], sum(len(size) == 2 for size in sizes)
        images = tuple(self._image(*one, layout, count) for one, layout in zip(shown, layouts, strict=True))
        decoded = [sizes[i][1:3] if i in files else sizes[i] for i in order]
        return Plan(
            prompt_tokens=tokens,
            image_tokens=sum(layout.tokens for layout in layouts),
            images=images,
            max_new_tokens=new,
            room=room,
            context_length=context_length,
            kv_cache_bytes=self._memory.cache_bytes(capacity, layouts, tokens),
            memory=self._memory.predict(tokens, layouts, decoded, new, capacity, self._base),
        )

    def _image(self, size: tuple[Any, ...], budget: TokenBudget, layout: Layout, images: int) -> PlannedImage:
        spec = self._model.image
        assert spec is not None
        settings: Mapping[str, Any] = {}
        if len(size) == 2:
            settings = settings_of(spec, within(spec, int(size[0]), int(size[1]), budget, images))
        shown = spec.video if spec.video is not None and layout.kind == "video" else spec
        cells = shown.patches is not None or spec.whole
        tiled = layout.kind == "image" and len(layout.grids) > 1
        parts = layout.grids[0] if tiled else (1, 1)  # tiles of cells
        pixels = layout.rows * parts[0] * spec.height, layout.cols * parts[1] * spec.width
        return PlannedImage(size[:3], layout.tokens, layout.tiles, (layout.rows, layout.cols), cells, pixels, settings)


def size_of(source: Source, sampling: FrameSampling | None = None) -> tuple[Any, ...]:
    """An image's (height, width), a video's (frames, height, width) and its `Timing` where it has one; of a video file
    one frame is decoded. `sampling`: the model's own rule, which frames of a file are taken. Raises ImageError."""
    if isinstance(source, EncodedImage):
        shown = source.shown
        return shown.size if shown.timing is None else (*shown.size, shown.timing)
    if isinstance(source, Video):
        first, timing = load_image(source.frames[0]), source.timing
        return (len(source.frames), first.height, first.width, *(() if timing is None else (timing,)))
    if isinstance(source, VideoFile):
        clip = source.clip(sampling)
        return (len(clip.times), *clip.size, timing_of(len(clip.times), clip.times, None, clip.duration))
    picture = load_image(source)
    return picture.height, picture.width
