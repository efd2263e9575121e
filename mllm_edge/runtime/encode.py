"""From a prompt to what the decoder gets of it: the stages before the decoder, in the order that the bundle states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.tables import table_inputs
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import ImageSpec, ModelSpec

__all__ = ["FEATURES", "Components", "encoded", "stage_runs"]

FEATURES = "image_features"
_DEEPSTACK = "deepstack."
Arrays = dict[str, np.ndarray]


class Components:
    """The stages' components: `inputs` of each by name, and `run` (component, inputs) → outputs."""

    def __init__(
        self, model: ModelSpec, inputs: Mapping[str, Sequence[str]], run: Callable[[str, Arrays], Arrays], slices: int
    ):
        """`slices`: how many of an image's slices a run takes at most, where they are independent."""
        self.model, self.slices, self._inputs, self._run = model, slices, inputs, run

    def run(self, given: Mapping[str, np.ndarray], trace: Trace) -> dict[str, Arrays]:
        """The outputs of all stages, by component, when the first are `given` these."""
        known, found = dict(given), dict[str, Arrays]()
        for stage in self.model.stages:
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
    for given in _image_inputs(components, image, prompt, arrays):
        yield components.run(given, trace)


def encoded(
    components: Components,
    prompt: Prompt,
    embed: Callable[[np.ndarray], np.ndarray],
    arrays: Mapping[str, np.ndarray],
    trace: Trace,
) -> Encoded:
    """All that a prompt is to the decoder. `embed`: ids [S] → rows [S, H]; `arrays`: the bundle's that
    `ImageSpec.arrays` names."""
    parts: dict[str, list[np.ndarray]] = {}
    for run in stage_runs(components, prompt, arrays, trace):
        for outputs in run.values():
            for name, array in outputs.items():
                if name == FEATURES or name.startswith(_DEEPSTACK):
                    rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
                    parts.setdefault(name, []).append(rows)
    with trace.span("embed"):
        embeds = embed(prompt.token_ids)
        rows_of = {name: _tokens(prompt, np.concatenate(rows), arrays) for name, rows in parts.items()}
        if FEATURES in rows_of:
            embeds[prompt.image_positions] = rows_of.pop(FEATURES)
        per_token = {name: _placed(rows, prompt) for name, rows in rows_of.items()}
        return Encoded(embeds, prompt.positions, per_token=per_token)


def _image_inputs(
    components: Components, image: ImageSpec, prompt: Prompt, arrays: Mapping[str, np.ndarray]
) -> Iterator[Arrays]:
    """The inputs of each run: some slices of all images, or those of one image or grid with its tables."""
    pixel_values = prompt.pixel_values
    assert pixel_values is not None
    if all(stage.per == "slice" for stage in components.model.stages):
        for start in range(0, len(pixel_values), components.slices):
            yield {"pixel_values": pixel_values[start : start + components.slices]}
        return
    start, grid, tables = 0, (0, 0), Arrays()
    for slices, rows, cols in chain.from_iterable(layout.runs for layout in prompt.layouts):
        if (rows, cols) != grid:  # tiles are alike
            grid, tables = (rows, cols), table_inputs(image, rows, cols, arrays)
        yield {"pixel_values": pixel_values[start : start + slices], **tables}
        start += slices


def _tokens(prompt: Prompt, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows [tokens, H] of all image tokens, of the features [n, H] of all images."""
    if all(layout.pack is None for layout in prompt.layouts):
        return rows
    counts = [layout.slices for layout in prompt.layouts]
    ends = np.cumsum(counts) * (len(rows) // sum(counts))
    images = np.split(rows, ends[:-1])
    packs = [layout.pack for layout in prompt.layouts]
    return np.concatenate(
        [part if pack is None else pack.apply(part, arrays) for pack, part in zip(packs, images, strict=True)]
    )


def _placed(rows: np.ndarray, prompt: Prompt) -> np.ndarray:
    """A row for each token [S, H], zeros where there is no image."""
    whole = np.zeros((len(prompt.token_ids), rows.shape[1]), np.float32)
    whole[prompt.image_positions] = rows
    return whole
