"""From a prompt to what the decoder gets of it: the stages before the decoder, in the order that the bundle states."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.masks import cross_bias
from mllm_edge.runtime.decode.text_inputs import text_inputs
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.shown import Shown
from mllm_edge.runtime.prompt.sources import Kind
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import (
    CROSS_BIAS,
    CROSS_ROWS,
    DEEPSTACK,
    ImageSpec,
    ImageTokens,
    ModelSpec,
    Stage,
    is_cross,
)

__all__ = ["FEATURES", "Components", "assembled", "encoded", "looked_at", "spans_of"]

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
            trace.check()
            with trace.span(stage.component):
                outputs = self._run(stage.component, {name: known[name] for name in self._inputs[stage.component]})
            known |= outputs
            found[stage.component] = outputs
        return found


def looked_at(
    components: Components,
    prompt: Prompt,
    arrays: Mapping[str, np.ndarray],
    trace: Trace,
    each: Callable[[dict[str, Arrays]], None] = lambda outputs: None,
    left_out: Collection[int] = (),
) -> list[Arrays]:
    """What the stages make of each image of a prompt: rows [n, …] by name of those that become tokens or that stages
    for the whole prompt take; what is known already is taken as it is. `arrays` and `each` as for `encoded`; of the
    images `left_out`, by their number, there is nothing."""
    image, wanted = components.model.image, components.taken(components.for_prompt)
    parts: list[dict[str, list[np.ndarray]]] = [{} for _ in prompt.shown]
    todo = [i for i, one in enumerate(prompt.shown) if one.features is None and i not in left_out]
    if image is not None and todo:
        shown = [prompt.shown[i] for i in todo]
        for owners, stages, given in _image_inputs(components, image, shown, prompt.texts, arrays):
            run = components.run(stages, given, trace)
            each(run)
            for name, array in ((n, a) for outputs in run.values() for n, a in outputs.items()):
                if name == FEATURES or name.startswith(DEEPSTACK) or name in wanted:
                    for i, rows in zip(owners, _shares(array, list(owners.values())), strict=True):
                        parts[todo[i]].setdefault(name, []).append(rows)
    return [
        dict(one.features) if one.features is not None else {name: _joined(rows) for name, rows in found.items()}
        for one, found in zip(prompt.shown, parts, strict=True)
    ]


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
    found = looked_at(components, prompt, arrays, trace, each)
    return assembled(components, prompt, found, embed, arrays, trace, each)


def assembled(
    components: Components,
    prompt: Prompt,
    found: Sequence[Arrays],
    embed: Callable[[np.ndarray], np.ndarray],
    arrays: Mapping[str, np.ndarray],
    trace: Trace,
    each: Callable[[dict[str, Arrays]], None] = lambda outputs: None,
    cross: Mapping[str, np.ndarray] | None = None,
) -> Encoded:
    """`encoded`, behind `looked_at`: images of which nothing was `found` have rows of zeros. `cross`: what
    cross-attention looks at, where that is known."""
    model, image = components.model, components.model.image
    if prompt.shown and cross is None:
        cross = _cross_of(components, found, trace, each)
    with trace.span("embed"):
        embeds = embed(prompt.token_ids)
        per_token: Arrays = {}
        for name in sorted({name for rows in found for name in rows if name == FEATURES or name.startswith(DEEPSTACK)}):
            rows = _tokens(prompt, [rows.get(name) for rows in found], arrays)
            if name == FEATURES:
                embeds[prompt.image_positions] = rows
            else:
                per_token[name] = _placed(rows, prompt)
        if prompt.shown and image is not None and image.around is not None:
            _put(embeds, prompt.token_ids, image.around, arrays)
        if cross:
            per_token |= _crossed(image, prompt)
    if model.text_encoder is None:
        return Encoded(embeds, prompt.positions, spans_of(image, prompt), per_token, cross or {})
    if len(embeds) > model.context_length:
        raise ContextError(
            f"the prompt has {len(embeds)} tokens, and the text encoder reads {model.context_length}",
            "use fewer or smaller images, or a shorter prompt",
        )
    run = components.run(components.for_prompt, text_inputs(model.text_encoder, embeds, arrays), trace)
    each(run)
    with trace.span("embed"):
        return Encoded(embed(np.array(model.text_encoder.start)), cross=_cross(run), read=embeds)


def _cross_of(
    components: Components,
    found: Sequence[Arrays],
    trace: Trace,
    each: Callable[[dict[str, Arrays]], None],
) -> Arrays:
    """What cross-attention looks at, of the rows of all images."""
    if not components.for_prompt or components.model.text_encoder is not None:
        return {}
    names = components.taken(components.for_prompt)
    joined = {name: np.concatenate([rows[name] for rows in found])[None] for name in names if name in found[0]}
    run = components.run(components.for_prompt, joined, trace)
    each(run)
    return _cross(run)


def _shares(array: np.ndarray, slices: Sequence[int]) -> list[np.ndarray]:
    """The rows [n, H] of each image in what a run made of so many slices of each."""
    rows = array.reshape(-1, array.shape[-1])
    return np.split(rows, np.cumsum(slices)[:-1] * (len(rows) // sum(slices)))  # of several images slices are alike


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _cross(run: Mapping[str, Arrays]) -> Arrays:
    """What cross-attention looks at, of the outputs of a run."""
    return {name: array for outputs in run.values() for name, array in outputs.items() if is_cross(name)}


def spans_of(image: ImageSpec | None, prompt: Prompt) -> np.ndarray | None:
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
    components: Components,
    image: ImageSpec,
    shown: Sequence[Shown],
    texts: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
) -> Iterator[tuple[dict[int, int], tuple[Stage, ...], Arrays]]:
    """Of each run: how many slices of which images it has, by their numbers; its stages, and their inputs: some slices
    of all images, or those of one image or grid with its tables; beside each slice the text. Images and videos that the
    same stages show are one."""
    grid, tables = (0, 0), Arrays()
    numbered = list(enumerate(shown))
    for stages, members in groupby(numbered, key=lambda one: components.showing(one[1].layout.kind)):
        group = list(members)
        if all(stage.per == "slice" for stage in stages):
            for owners, pixels in _batches(group, components.slices):
                yield owners, stages, pixels | _beside(texts, sum(owners.values()))
            continue
        for i, one in group:
            start = 0
            for slices, rows, cols in one.layout.runs:
                if (rows, cols) != grid:  # tiles are alike
                    grid, tables = (rows, cols), table_inputs(image, rows, cols, arrays)
                pixels = {name: made[start : start + slices] for name, made in (one.inputs or {}).items()}
                yield {i: slices}, stages, {**pixels, **tables, **_beside(texts, slices)}
                start += slices


def _batches(shown: Sequence[tuple[int, Shown]], most: int) -> Iterator[tuple[dict[int, int], Arrays]]:
    """So many slices at once, of one image or several."""
    owners, parts = dict[int, int](), list[Mapping[str, np.ndarray]]()
    for i, one in shown:
        assert one.inputs is not None
        start, slices = 0, one.layout.slices
        while start < slices:
            end = min(slices, start + most - sum(owners.values()))
            owners[i] = end - start
            parts.append({name: made[start:end] for name, made in one.inputs.items()})
            start = end
            if sum(owners.values()) == most:
                yield owners, {name: _joined([part[name] for part in parts]) for name in parts[0]}
                owners, parts = {}, []
    if owners:
        yield owners, {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _beside(texts: Mapping[str, np.ndarray], slices: int) -> Arrays:
    """The text beside so many slices."""
    return {name: np.repeat(ids, slices, axis=0) for name, ids in texts.items()}


def _tokens(prompt: Prompt, found: Sequence[np.ndarray | None], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows [tokens, H] of all image tokens, of the features [n, H] of each image; zeros for those without."""
    hidden = next(rows.shape[1] for rows in found if rows is not None)
    rows_of = list[np.ndarray]()
    for one, rows in zip(prompt.layouts, found, strict=True):
        if rows is None:
            rows_of.append(np.zeros((one.tokens, hidden), np.float32))
        else:
            plain = rows.astype(np.float32, copy=False)
            rows_of.append(plain if one.pack is None else one.pack.apply(plain, arrays))
    return _joined(rows_of)


def _put(embeds: np.ndarray, token_ids: np.ndarray, tokens: ImageTokens, arrays: Mapping[str, np.ndarray]) -> None:
    """The rows of tokens around images into their places."""
    for token, row in zip(tokens.ids, arrays[tokens.file], strict=True):
        embeds[token_ids == token] = row


def _placed(rows: np.ndarray, prompt: Prompt) -> np.ndarray:
    """A row for each token [S, H], zeros where there is no image."""
    whole = np.zeros((len(prompt.token_ids), rows.shape[1]), np.float32)
    whole[prompt.image_positions] = rows
    return whole
