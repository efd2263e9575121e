"""Calibration of one component: piece by piece, statistics first, then every layer's codes, scales and ranges.

Everything that is found lies in a folder, so that a calibration that was interrupted goes on with the next piece.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.decide import Decision
from mllm_edge.calibration.findings import Findings, is_whole
from mllm_edge.calibration.int8_cache import largest, rotated
from mllm_edge.calibration.linears import Group, Layer, find_groups, find_layers
from mllm_edge.calibration.passing import PassingReader, PassingWriter
from mllm_edge.calibration.segments import Segment, cut, extract
from mllm_edge.calibration.statistics import HELD_BYTES, InputStatistics
from mllm_edge.errors import DataError
from mllm_edge.files import sync, write_whole
from mllm_edge.graph.precision import Precision
from mllm_edge.runtime.backends.base import Backend
from mllm_edge.spec import Variant, is_state

__all__ = ["calibrate", "held_apart", "row_weights"]

SEGMENT_BYTES = 768 << 20
# Inputs of a decoder that tell its rows of the answer: see `row_weights`.
_ROWS = ("inputs_embeds", "logits_indices")
# One of so many runs is held apart, but not many more than `_ENOUGH`; of fewer than `_FEWEST` none.
_HELD, _ENOUGH, _FEWEST = 5, 24, 4
# Of what a layer's weights are fitted to, for each of its columns.
_ROWS_PER_COLUMN, _LEAST_RUNS = 24, 64
_CHEAP = 1e12  # products in a pass over all runs: some ten seconds on two cores
_LOOKED_AT = 8  # runs, for the number of their rows
# The values between pieces: of the float model, and of one whose earlier pieces are rounded.
_EXACT, _ROUNDED = "exact", "rounded"
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
    sequential: bool = True,
) -> Findings:
    """Run the float graph of a component over `feeds`, piece by piece, and find what its layers' precisions ask for.

    `precision(layer name)` as the recipe says; `cache`: the range of keys and values, too; `sequential`: layers that
    GPTQ rounds are shown what the rounded layers before them give, and not what the float ones do. `begin` gets the
    number of runs of float pieces, and `progress(1)` follows each. Raises DataError when an activation is not finite.
    """
    model = ir.load(graph_file)
    findings = Findings(folder / "layers")
    folder.mkdir(parents=True, exist_ok=True)
    groups = {layer.name: group for group in find_groups(find_layers(model.graph)) for layer in group.layers}
    if variant.kv_mode is None:
        feeds = feeds.spread(
            _enough(feeds, variant, [layer for group in set(groups.values()) for layer in group.layers])
        )
    sequential = sequential and any("gptq" in precision(name).method for name in groups)
    segments = cut(model.graph, 0 if sequential else SEGMENT_BYTES)
    state = _State(model, folder, feeds, graph_file, variant, backend, progress, sequential)
    done = state.pieces_done(segments)
    begin(len(segments) * len(feeds))
    for number, segment in enumerate(segments):
        own = list(dict.fromkeys(groups[name] for name in segment.layers))
        wanted = [group for group in own if any(precision(layer.name).needs_data for layer in group.layers)]
        if number < done:
            progress(len(feeds))
            continue
        caches = _caches(model.graph, segment) if cache else []
        statistics, peaks = state.run(number, segment, wanted, precision, caches)
        row_factors: dict[str, np.ndarray] = {}
        # From the last to the first: a layer's rows may take the factors of the group behind it.
        for group in reversed(wanted):
            Decision(group, statistics[group.x.name or ""], precision, row_factors, findings).make()
        for name, found in peaks.items():
            findings.add_cache(name, found)
        if sequential and segment.gives:
            state.pass_rounded(number, segment, findings)
        state.finish(number)
    return findings


def _enough(feeds: Feeds, variant: Variant, layers: Sequence[Layer]) -> int:
    """How many runs of a component that sees images give enough rows to fit its widest layer, or more where they cost
    little. (A decoder's rows are as different as what is asked: of those none is too many.)"""
    name, shape = variant.inputs[0].name, variant.outputs[0].shape
    per_slice = math.prod(size for size in shape[1:-1] if isinstance(size, int))
    some = [feeds.read(i * len(feeds) // _LOOKED_AT, [name])[name] for i in range(_LOOKED_AT)] if len(feeds) else []
    rows = min((len(pixels) for pixels in some), default=1) * per_slice
    widest, weights = max((layer.shape[1] for layer in layers), default=1), sum(math.prod(a.shape) for a in layers)
    return max(_LEAST_RUNS, -(-_ROWS_PER_COLUMN * widest // rows), int(_CHEAP / max(weights * rows, 1)))


def _caches(graph: ir.Graph, segment: Segment) -> list[str]:
    """The new keys and values that a piece makes."""
    made = {v.name for node in list(graph)[segment.start : segment.stop] for v in node.outputs}
    return [v.name for v in graph.outputs if v.name and v.name in made and is_state(v.name, "growing")]


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


def held_apart(run: int, runs: int) -> bool:
    """Whether a run judges what is found from the others: every fifth of up to 144, some two dozen of more, one of
    four, none of fewer."""
    every = max(_HELD, runs // _ENOUGH)
    return run % every == min(every, runs) - 1 if runs >= _FEWEST else False


class _State:
    """Where a calibration stands: the values between the last piece and the next, run by run."""

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        feeds: Feeds,
        graph_file: Path,
        variant: Variant,
        backend: Backend,
        progress: Progress,
        sequential: bool,
    ):
        self._model, self._own = model, [v.name or "" for v in model.graph.inputs]
        self._read: list[str] = []  # of the graph's own inputs those that the piece wants
        self._folder, self._feeds, self._graph_file = folder, feeds, graph_file
        self._variant, self._backend, self._progress = variant, backend, progress
        self._sequential = sequential
        self._part: ir.Model | None = None
        # What the piece before passes, by stream, and the files of what this one does.
        self._passed, self._written = {}, []  # type: dict[str, PassingReader], list[Path]
        self._receive(-1, [])
        self._prefixes: dict[int, int] = {}

    def pieces_done(self, segments: Sequence[Segment]) -> int:
        """How many pieces an earlier attempt did. What it left must be whole, as far as it is needed: otherwise all is
        cleared, and done again."""
        count = 0
        while count < len(segments) and (self._folder / f"done-{count}").exists():
            count += 1
        layers, passing = self._left_behind(count - 1)
        if layers is not None and all(is_whole(path) for path in (*layers, *passing)):
            self._receive(count - 1, passing)
            return count
        shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        return 0

    def _left_behind(self, number: int) -> tuple[list[Path] | None, list[Path]]:
        """Files of what had been found when a piece was done, and of what it passes on; None when that cannot be read,
        or no piece was."""
        try:
            note = json.loads((self._folder / f"done-{number}").read_text(encoding="utf-8"))
            layers = [self._folder / "layers" / name for name in note["layers"]]
            return layers, [self._folder / name for name in note["passing"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None, []

    def _receive(self, number: int, files: Sequence[Path]) -> None:
        """From now on the `files` of piece `number` are what is passed."""
        for stream in (_EXACT, _ROUNDED):
            prefix = _prefix(stream, number)
            self._passed[stream] = PassingReader(path for path in files if path.name.startswith(prefix))

    def finish(self, number: int) -> None:
        """The piece is done: said when all that it left is on the disk."""
        files, self._written = self._written, []
        sync(files)
        layers = sorted(path.name for path in (self._folder / "layers").glob("*.npz"))
        note = {"layers": layers, "passing": [path.name for path in files]}
        write_whole(self._folder / f"done-{number}", json.dumps(note))
        self._receive(number, files)
        for path in self._folder.glob(f"passing-*-{number - 1}-*.npz"):
            path.unlink()

    def run(
        self,
        number: int,
        segment: Segment,
        groups: Sequence[Group],
        precision: Any,
        caches: Sequence[str],
    ) -> tuple[dict[str, InputStatistics], dict[str, np.ndarray]]:
        """Statistics of the groups' inputs and the largest magnitudes [heads, D] of the `caches`, by name; what the
        float piece passes to the next is left on disk."""
        statistics = {
            group.x.name or "": InputStatistics(
                group.width,
                any("gptq" in precision(layer.name).method for layer in group.layers),
                HELD_BYTES // max(len(groups), 1),
            )
            for group in groups
        }
        peaks: dict[str, np.ndarray] = {}
        if not statistics and not segment.gives and not caches:
            self._progress(len(self._feeds))
            return statistics, peaks
        self._part = self._extract(segment, [*statistics, *caches])
        session, runs = self._open(), len(self._feeds)
        writer = PassingWriter(self._folder, _prefix(_EXACT, number))
        for i in range(runs):
            exact = self._values(session, _EXACT, i)
            rounded = exact
            if self._sequential and number and statistics:
                rounded = self._values(session, _ROUNDED, i, statistics)
            held = held_apart(i, runs)
            shared = self._shared(i, exact) if held else 0
            for name, found in statistics.items():
                weights = row_weights(exact, exact[name])
                if shared and weights is not None:
                    weights[:shared] = 0
                try:
                    found.add(rounded[name], weights, None if rounded is exact else exact[name], held)
                except ValueError as e:
                    raise DataError(
                        f"{self._graph_file}: {name}: {e} in run {i}", "use a recipe that keeps this part in float32"
                    ) from e
            for name in caches:
                found_peaks = self._peaks(name, exact[name], tokens=exact["inputs_embeds"].shape[1])
                peaks[name] = np.maximum(peaks.get(name, found_peaks), found_peaks)
            writer.add({name: exact[name] for name in segment.gives})
            self._progress(1)
        self._close(writer)
        return statistics, peaks

    def pass_rounded(self, number: int, segment: Segment, findings: Findings) -> None:
        """Run the piece with the weights that were found, on what the rounded pieces before it gave; what it passes to
        the next is left on disk."""
        for layer in find_layers(self._part.graph) if self._part else ():
            found = findings.layer(layer.name)
            weight = None if found is None else found.replaced()
            stored = layer.weight.const_value
            if weight is not None and stored is not None:
                layer.weight.const_value = ir.tensor(
                    np.ascontiguousarray(weight.T, stored.dtype.numpy()), name=layer.weight.name
                )
        session, writer = self._open(), PassingWriter(self._folder, _prefix(_ROUNDED, number))
        for i in range(len(self._feeds)):
            values = self._values(session, _ROUNDED, i)
            writer.add({name: values[name] for name in segment.gives})
        self._close(writer)

    def _values(
        self, session: Any, stream: str, run: int, wanted: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """By name what the piece is given in a run, and what it makes of that; it is not run where it is given all that
        is `wanted`."""
        inputs = {**self._feeds.read(run, self._read), **self._passed[stream].read(run)}
        if self._part is None or (wanted is not None and inputs.keys() >= set(wanted)):
            return inputs
        return {**inputs, **session.run({v.name or "": inputs[v.name or ""] for v in self._part.graph.inputs})}

    def _close(self, writer: PassingWriter) -> None:
        writer.flush()
        self._written += writer.files

    def _shared(self, run: int, values: Mapping[str, np.ndarray]) -> int:
        """How many rows at a decoder's start are those of the first run, too (the template's own words): they tell
        nothing about unseen ones."""
        if "inputs_embeds" not in values:
            return 0
        if run not in self._prefixes:
            self._prefixes[run] = self._prefix(run, values)
        return self._prefixes[run]

    def _prefix(self, run: int, values: Mapping[str, np.ndarray]) -> int:
        if run == 0:
            return 0
        first = self._feeds.read(0, ["inputs_embeds"])["inputs_embeds"][0]
        own = values["inputs_embeds"][0]
        length = min(len(first), len(own))
        differs = np.flatnonzero((first[:length] != own[:length]).any(axis=1))
        return int(differs[0]) if len(differs) else length

    def _peaks(self, name: str, rows: np.ndarray, tokens: int) -> np.ndarray:
        """Largest magnitudes [heads, D] of the first `tokens` keys or values."""
        heads_first = rows if self._variant.kv_mode == "in_place" else rows.swapaxes(1, 2)
        return largest(heads_first[:, :, :tokens], rotated(self._variant) if name.endswith(".key") else ())

    def _extract(self, segment: Segment, record: Sequence[str]) -> ir.Model | None:
        """The piece as a model; values that it is given it need not compute. None where nothing is left."""
        given = {*self._own, *segment.needs}
        types = {n: ir.DataType.from_numpy(v.dtype) for n, v in self._passed[_EXACT].read(0).items()}
        kept = Segment(segment.needs, tuple(n for n in segment.gives if n not in given), segment.layers)
        missing = [n for n in record if n not in given]
        part = extract(self._model, kept, missing, types) if kept.gives or missing else None
        wanted = {*record, *_ROWS, *(v.name for v in (part.graph.inputs if part else ()))}
        self._read = [name for name in self._own if name in wanted]
        return part

    def _open(self) -> Any:
        """A session of the piece, or None where it has nothing to compute."""
        if self._part is None:
            return None
        path = self._folder / "piece.onnx"
        ir.save(self._part, path, external_data=f"{path.name}.data")
        return self._backend.open(path, self._variant)


def _prefix(stream: str, number: int) -> str:
    """How the files are called that a piece passes on."""
    return f"passing-{stream}-{number}"
