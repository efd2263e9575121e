"""From a prompt to what the decoder gets of it: the stages before the decoder, in the order that the bundle states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.masks import cross_bias
from mllm_edge.runtime.decode.text_inputs import text_inputs
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.sources import Kind
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import (
    CROSS_BIAS,
    CROSS_ROWS,
    DEEPSTACK,
    PIXELS,
    ImageSpec,
    ModelSpec,
    Stage,
    is_cross,
)

__all__ = ["FEATURES", "Components", "encoded", "stage_runs"]

FEATURES = "image_features"
Arrays = dict[str, np.ndarray]


class Components:
    """The stages' components: `inputs` of each by name, and `run` (component, inputs) → outputs."""

    def __init__(
        self, model: ModelSpec, inputs: Mapping[str, Sequence[str]], run: Callable[[str, Arrays], Arrays], slices: int
    ):
        """`slices`: how many of an image's slices a run takes at most, where they are independent."""
        self.model, self.slices, self._inputs, self._run = model, slices, inputs, run

    def showing(self, kind: Kind) -> tuple[Stage, ...]:
        """The stages that run for slices or images, or for those of videos."""
        return tuple(stage for stage in self.model.stages if stage.per != "prompt" and stage.is_for(kind))

    @property
    def for_prompt(self) -> tuple[Stage, ...]:
        """Those that run once, behind the others."""
        return tuple(stage for stage in self.model.stages if stage.per == "prompt")

    def taken(self, stages: Sequence[Stage]) -> set[str]:
        """The inputs of these stages."""
        return {name for stage in stages for name in self._inputs[stage.component]}

    def run(self, stages: Sequence[Stage], given: Mapping[str, np.ndarray], trace: Trace) -> dict[str, Arrays]:
        """The outputs of some stages, by component, when the first are `given` these."""
        known, found = dict(given), dict[str, Arrays]()
        for stage in stages:
            with trace.span(stage.component):
                outputs = self._run(stage.component, {name: known[name] for name in self._inputs[stage.component]})
            known |= outputs
            found[stage.component] = outputs
        return found


def stage_runs(
    components: Components, prompt: Prompt, arrays: Mapping[str, np.ndarray], trace: Trace
) -> Iterator[dict[str, Arrays]]:
    """The outputs of each run that the images of a prompt take, by component; `arrays` as for `encoded`."""
    image = components.model.image
    if image is None or prompt.pixel_values is None:
        return
    whole, rows = components.taken(components.for_prompt), dict[str, list[np.ndarray]]()
    for stages, given in _image_inputs(components, image, prompt, arrays):
        run = components.run(stages, given, trace)
        yield run
        for name, array in ((n, a) for outputs in run.values() for n, a in outputs.items() if n in whole):
            rows.setdefault(name, []).append(array.reshape(1, -1, array.shape[-1]))
    if components.for_prompt and components.model.text_encoder is None:
        joined = {name: np.concatenate(arrays, axis=1) for name, arrays in rows.items()}
        yield components.run(components.for_prompt, joined, trace)


def encoded(
    components: Components,
    prompt: Prompt,
    embed: Callable[[np.ndarray], np.ndarray],
    arrays: Mapping[str, np.ndarray],
    trace: Trace,
    each: Callable[[dict[str, Arrays]], None] = lambda outputs: None,
) -> Encoded:
    """All that a prompt is to the decoder. `embed`: ids [S] → rows [S, H]; `arrays`: the bundle's that
    `ModelSpec.arrays` names; `each` gets the outputs of each run of the stages, by component.

    Raises ContextError for a prompt that is longer than a text encoder reads."""
    model, parts, cross = components.model, dict[str, list[np.ndarray]](), Arrays()
    for run in stage_runs(components, prompt, arrays, trace):
        each(run)
        for outputs in run.values():
            for name, array in outputs.items():
                if name == FEATURES or name.startswith(DEEPSTACK):
                    rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
                    parts.setdefault(name, []).append(rows)
        cross |= _cross(run)
    with trace.span("embed"):
        embeds = embed(prompt.token_ids)
        rows_of = {name: _tokens(prompt, np.concatenate(rows), arrays) for name, rows in parts.items()}
        if FEATURES in rows_of:
            embeds[prompt.image_positions] = rows_of.pop(FEATURES)
        per_token = {name: _placed(rows, prompt) for name, rows in rows_of.items()}
        if cross:
            per_token |= _crossed(model.image, prompt)
    if model.text_encoder is None:
        return Encoded(embeds, prompt.positions, _spans(model.image, prompt), per_token, cross)
    if len(embeds) > model.context_length:
        raise ContextError(
            f"the prompt has {len(embeds)} tokens, and the text encoder reads {model.context_length}",
            "use fewer or smaller images, or a shorter prompt",
        )
    run = components.run(components.for_prompt, text_inputs(model.text_encoder, embeds, arrays), trace)
    each(run)
    with trace.span("embed"):
        return Encoded(embed(np.array(model.text_encoder.start)), cross=_cross(run), read=embeds)


def _cross(run: Mapping[str, Arrays]) -> Arrays:
    """What cross-attention looks at, of the outputs of a run."""
    return {name: array for outputs in run.values() for name, array in outputs.items() if is_cross(name)}


def _spans(image: ImageSpec | None, prompt: Prompt) -> np.ndarray | None:
    """Which tokens see each other in both directions, as of `Encoded`."""
    if image is not None and image.both_ways == "prompt":
        return np.ones(len(prompt.token_ids), np.int64)
    if image is None or image.both_ways is None or not prompt.layouts:
        return None
    spans, counts = np.zeros(len(prompt.token_ids), np.int64), [layout.tokens for layout in prompt.layouts]
    spans[prompt.image_positions] = np.repeat(np.arange(1, len(counts) + 1), counts)
    return spans


def _crossed(image: ImageSpec | None, prompt: Prompt) -> Arrays:
    """Which features cross-attention shows each token: of tiles that an image lacks none."""
    assert image is not None
    shown = [layout.tiles * image.features for layout in prompt.layouts]
    features = prompt.layouts[0].slices * image.features
    bias, rows = cross_bias(len(prompt.token_ids), prompt.image_positions.tolist(), shown, features)
    return {CROSS_BIAS: bias, CROSS_ROWS: rows}


def _image_inputs(
    components: Components, image: ImageSpec, prompt: Prompt, arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[tuple[Stage, ...], Arrays]]:
    """The stages and the inputs of each run: some slices of all images, or those of one image or grid with its tables;
    beside each slice the text. Images and videos that the same stages show are one."""
    assert prompt.pixel_values is not None
    pixels = {PIXELS: prompt.pixel_values, **prompt.views}
    start, grid, tables = 0, (0, 0), Arrays()
    for stages, group in groupby(prompt.layouts, key=lambda layout: components.showing(layout.kind)):
        runs = [run for layout in group for run in layout.runs]
        if all(stage.per == "slice" for stage in stages):
            end = start + sum(slices for slices, _, _ in runs)
            for first in range(start, end, components.slices):
                last = min(first + components.slices, end)
                yield stages, {name: rows[first:last] for name, rows in pixels.items()} | _beside(prompt, last - first)
            start = end
            continue
        for slices, rows, cols in runs:
            if (rows, cols) != grid:  # tiles are alike
                grid, tables = (rows, cols), table_inputs(image, rows, cols, arrays)
            shown = {name: made[start : start + slices] for name, made in pixels.items()}
            yield stages, {**shown, **tables, **_beside(prompt, slices)}
            start += slices


def _beside(prompt: Prompt, slices: int) -> Arrays:
    """The text beside so many slices."""
    return {name: np.repeat(ids, slices, axis=0) for name, ids in prompt.texts.items()}


def _tokens(prompt: Prompt, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows [tokens, H] of all image tokens, of the features [n, H] of all images."""
    if all(layout.pack is None for layout in prompt.layouts):
        return rows
    images = np.split(rows, np.cumsum([layout.features for layout in prompt.layouts])[:-1])
    packs = [layout.pack for layout in prompt.layouts]
    return np.concatenate(
        [part if pack is None else pack.apply(part, arrays) for pack, part in zip(packs, images, strict=True)]
    )


def _placed(rows: np.ndarray, prompt: Prompt) -> np.ndarray:
    """A row for each token [S, H], zeros where there is no image."""
    whole = np.zeros((len(prompt.token_ids), rows.shape[1]), np.float32)
    whole[prompt.image_positions] = rows
    return whole
