"""Calibration of one component: piece by piece, statistics first, then every layer's codes, scales and ranges.

Everything that is found lies in a folder, so that a calibration that was interrupted goes on with the next piece.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.decide import Decision
from mllm_edge.calibration.findings import Findings, save_arrays
from mllm_edge.calibration.layers import Group, find_groups, find_layers
from mllm_edge.calibration.recipes import Precision
from mllm_edge.calibration.segments import Segment, cut, extract
from mllm_edge.calibration.statistics import InputStatistics
from mllm_edge.errors import DataError
from mllm_edge.runtime.backend import Backend
from mllm_edge.spec import Variant

__all__ = ["calibrate", "row_weights"]

SEGMENT_BYTES = 768 << 20
Progress = Callable[[int], None]


def calibrate(
    graph_file: Path,
    variant: Variant,
    backend: Backend,
    feeds: Feeds,
    precision: Callable[[str], Precision],
    folder: Path,
    begin: Progress = lambda runs: None,
    progress: Progress = lambda runs: None,
    cache: bool = False,
) -> Findings:
    """Run the float graph of a component over `feeds`, piece by piece, and find what its layers' precisions ask for.

    `precision(layer name)` as the recipe says; `cache`: the range of keys and values, too. `begin` gets the number of
    runs, and `progress(1)` follows each. Raises DataError when an activation is not finite.
    """
    model = ir.load(graph_file)
    findings = Findings(folder / "layers")
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(folder, feeds, graph_file, variant, backend, progress)
    groups = {layer.name: group for group in find_groups(find_layers(model.graph)) for layer in group.layers}
    segments = cut(model.graph, SEGMENT_BYTES)
    begin(len(segments) * len(feeds))
    for number, segment in enumerate(segments):
        own = list(dict.fromkeys(groups[name] for name in segment.layers))
        wanted = [group for group in own if any(precision(layer.name).needs_data for layer in group.layers)]
        if state.done(number):
            progress(len(feeds))
            continue
        caches = _caches(model.graph, segment) if cache else []
        statistics, peaks = state.run(model, number, segment, wanted, precision, caches)
        row_factors: dict[str, np.ndarray] = {}
        # From the last to the first: a layer's rows may take the factors of the group behind it.
        for group in reversed(wanted):
            Decision(group, statistics[group.x.name or ""], precision, row_factors, findings).make()
        for name, found in peaks.items():
            findings.add_cache(name, found)
        state.finish(number)
    return findings


def _caches(graph: ir.Graph, segment: Segment) -> list[str]:
    """The new keys and values that a piece makes."""
    made = {v.name for node in list(graph)[segment.start : segment.stop] for v in node.outputs}
    return [v.name for v in graph.outputs if v.name and v.name in made and v.name.startswith("present.")]


def row_weights(inputs: Mapping[str, np.ndarray], value: np.ndarray) -> np.ndarray | None:
    """Weights [S] of a decoder's rows [1, S, K]: those that make the answer count together as much as the prompt's,
    which are many more and mostly an image's, although no token comes of them. None: all alike."""
    tokens = inputs["inputs_embeds"].shape[1] if "inputs_embeds" in inputs else 0
    answer = inputs["logits_indices"].ravel() if "logits_indices" in inputs else np.zeros(0, np.int64)
    if value.shape[:-1] != (1, tokens) or not 0 < len(answer) < tokens:
        return None
    weights = np.full(tokens, 0.5 * tokens / (tokens - len(answer)), np.float32)
    weights[answer] = 0.5 * tokens / len(answer)
    return weights


class _State:
    """Where a calibration stands: the values between the last piece and the next, run by run."""

    def __init__(
        self, folder: Path, feeds: Feeds, graph_file: Path, variant: Variant, backend: Backend, progress: Progress
    ):
        self._folder, self._feeds, self._graph_file = folder, feeds, graph_file
        self._variant, self._backend, self._progress = variant, backend, progress
        self._inputs: list[str] = []

    def done(self, number: int) -> bool:
        return (self._folder / f"done-{number}").exists()

    def finish(self, number: int) -> None:
        (self._folder / f"done-{number}").touch()
        for path in self._folder.glob(f"passing-{number - 1}-*.npz"):
            path.unlink()

    def run(
        self,
        model: ir.Model,
        number: int,
        segment: Segment,
        groups: Sequence[Group],
        precision: Any,
        caches: Sequence[str],
    ) -> tuple[dict[str, InputStatistics], dict[str, np.ndarray]]:
        """Statistics of the groups' inputs and the largest magnitudes [heads, D] of the `caches`, by name; what passes
        to the next piece is left on disk."""
        statistics = {
            group.x.name or "": InputStatistics(
                group.width, any("gptq" in precision(layer.name).method for layer in group.layers)
            )
            for group in groups
        }
        peaks: dict[str, np.ndarray] = {}
        if not statistics and not segment.gives and not caches:
            self._progress(len(self._feeds))
            return statistics, peaks
        session = self._open(model, number, segment, [*statistics, *caches])
        own = [v.name or "" for v in model.graph.inputs]
        for i in range(len(self._feeds)):
            passed = self._passed(number - 1, i)
            inputs = {**self._feeds.read(i, own), **passed}
            outputs = session.run({n: inputs[n] for n in self._inputs}) if session else {}
            for name, found in statistics.items():
                value = outputs[name] if name in outputs else inputs[name]
                try:
                    found.add(value, row_weights(inputs, value))
                except ValueError as e:
                    raise DataError(
                        f"{self._graph_file}: {name}: {e} in run {i}", "use a recipe that keeps this part in float32"
                    ) from e
            for name in caches:
                found_peaks = self._peaks(outputs[name], tokens=inputs["inputs_embeds"].shape[1])
                peaks[name] = np.maximum(peaks.get(name, found_peaks), found_peaks)
            if segment.gives:
                passing = {n: outputs[n] if n in outputs else inputs[n] for n in segment.gives}
                save_arrays(self._folder / f"passing-{number}-{i}.npz", passing)
            self._progress(1)
        return statistics, peaks

    def _peaks(self, rows: np.ndarray, tokens: int) -> np.ndarray:
        """Largest magnitudes [heads, D] of the first `tokens` keys or values."""
        in_place = self._variant.kv_mode == "in_place"
        new = rows[:, :, :tokens] if in_place else rows[:, :tokens]
        return np.abs(new).max(axis=(0, 2) if in_place else (0, 1)).astype(np.float32)

    def _open(self, model: ir.Model, number: int, segment: Segment, record: Sequence[str]) -> Any:
        """A session of the piece, or None: values that it is given it need not compute."""
        given = {*(v.name for v in model.graph.inputs), *segment.needs}
        types = {n: ir.DataType.from_numpy(v.dtype) for n, v in self._passed(number - 1, 0).items()}
        kept = Segment(segment.needs, tuple(n for n in segment.gives if n not in given), segment.layers)
        missing = [n for n in record if n not in given]
        if not kept.gives and not missing:
            return None
        part = extract(model, kept, missing, types)
        path = self._folder / "piece.onnx"
        ir.save(part, path, external_data=f"{path.name}.data")
        self._inputs = [v.name or "" for v in part.graph.inputs]
        return self._backend.open(path, self._variant)

    def _passed(self, number: int, run: int) -> dict[str, np.ndarray]:
        path = self._folder / f"passing-{number}-{run}.npz"
        if not path.is_file():
            return {}
        with np.load(path) as data:
            return dict(data)
