"""What the dynamic dimensions of the stages' graphs are for given images, from their sizes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from mllm_edge.runtime.limits import TILES_PER_RUN
from mllm_edge.runtime.prompt.layout import Layout, layout_of
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, within
from mllm_edge.spec import ImageSpec, LearnedPositions, ModelSpec, Stage, Variant, cross_bytes

__all__ = ["crossed", "crossed_bytes", "layouts_of", "stage_runs"]


def layouts_of(image: ImageSpec | None, sizes: Sequence[tuple[int, int]], budget: TokenBudget = FREE) -> list[Layout]:
    """The layouts of images of these (width, height)."""
    if image is None:
        return []
    count = len(sizes)
    return [layout_of(within(image, high, wide, budget, count), high, wide, count) for wide, high in sizes]


def crossed(model: ModelSpec, layouts: Sequence[Layout], tokens: int = 0) -> int:
    """How many features of images of these layouts cross-attention looks at; or, in an encoder-decoder, how many of the
    prompt's `tokens`."""
    if model.text_encoder is not None:
        return tokens
    if model.image is None or model.image.into != "cross_attention":
        return 0
    return sum(layout.slices for layout in layouts) * model.image.features


def crossed_bytes(model: ModelSpec, variants: Mapping[str, Variant], layouts: Sequence[Layout], tokens: int = 0) -> int:
    """Bytes of the keys and values that cross-attention keeps of these images, for as long as they are talked about;
    `tokens` as for `crossed`."""
    return cross_bytes((t for variant in variants.values() for t in variant.outputs), crossed(model, layouts, tokens))


def stage_runs(
    model: ModelSpec, stage: Stage, variants: Mapping[str, Variant], layouts: Sequence[Layout], prompt_tokens: int = 0
) -> list[tuple[dict[str, int], int]]:
    """The dimensions of each run of a stage that images of these layouts take, by symbol, and the sequences that see
    themselves in it; `variants`: the graph that each component runs. `prompt_tokens`: those of the prompt, which a text
    encoder reads, and by which a text of the stages' own is guessed: it has about as many as there are beside the
    images."""
    told = max(0, prompt_tokens - sum(layout.tokens for layout in layouts))
    layouts = [layout for layout in layouts if stage.is_for(layout.kind)]
    looked_at = crossed(model, layouts, prompt_tokens)
    if stage.per == "prompt" and looked_at:
        taken = {size for t in variants[stage.component].inputs for size in t.shape if isinstance(size, str)}
        return [({symbol: 1 if symbol == "batch" else looked_at for symbol in taken}, 1)]
    if model.image is None or not layouts:
        return []
    inputs = {t.name: t.shape for stage in model.stages for t in variants[stage.component].inputs}
    text = {} if model.image.text is None else {model.image.text.name: min(told, model.image.text.most)}
    if "image" not in {stage.per for stage in model.stages}:
        slices = sum(layout.slices for layout in layouts)
        counts = [min(TILES_PER_RUN, slices - start) for start in range(0, slices, TILES_PER_RUN)]
        return [
            (_symbols(inputs, {"pixel_values": (count, *model.image.shape), **_beside(text, count)}), count)
            for count in counts
        ]
    # Learned positions are as many as the cells of pixel_values.
    image = replace(model.image, tables=tuple(t for t in model.image.tables if not isinstance(t, LearnedPositions)))
    found = []
    for slices, rows, cols in chain.from_iterable(layout.runs for layout in layouts):
        shapes = {name: array.shape for name, array in table_inputs(image, rows, cols, {}).items()}
        pixels = (slices, *(_whole(layouts, image) if image.whole else image.shape))
        found.append((_symbols(inputs, {**shapes, "pixel_values": pixels, **_beside(text, slices)}), 1))
    return found


def _whole(layouts: Sequence[Layout], image: ImageSpec) -> tuple[int, int, int]:
    """The shape of the canvas that whole images lie on."""
    rows, cols = max(layout.rows for layout in layouts), max(layout.cols for layout in layouts)
    return (image.channels, rows * image.height, cols * image.width)


def _beside(text: Mapping[str, int], slices: int) -> dict[str, tuple[int, ...]]:
    return {name: (slices, tokens) for name, tokens in text.items()}


def _symbols(inputs: Mapping[str, tuple[int | str, ...]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    known = [(dims, shapes[name]) for name, dims in inputs.items() if name in shapes]
    return {d: n for dims, shape in known for d, n in zip(dims, shape, strict=True) if isinstance(d, str)}
