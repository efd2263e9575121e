"""What rounding a few layers alone does to the next token's distribution, measured through the shipping runtime."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.collect import answer_tokens
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.evaluate import divergence, led_tokens
from mllm_edge.calibration.layers import find_layers
from mllm_edge.files import write_whole
from mllm_edge.runtime.backend import Backend, Session
from mllm_edge.runtime.score import continued, score
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import Variant

__all__ = ["Unit", "affordable", "along_answers", "measure", "measure_all"]

_MOST_SAMPLES = 4
# Parameters times runs: some minutes on two cores for prompts of a few hundred tokens.
_MOST_WORK = 2e11
_ROWS = 64  # of the logits, the last ones


@dataclass(frozen=True)
class Unit:
    """Layers of a component that are rounded together."""

    component: str
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.component}: {self.layers[0]}"


def affordable(units: int, parameters: float) -> int:
    """On how many samples so many units of a model can be measured; 0 for models too large for any."""
    return min(_MOST_SAMPLES, int(_MOST_WORK / max(units * parameters, 1.0)))


def measure(
    bundle: Bundle,
    backend: Backend,
    samples: Sequence[Sample],
    units: Sequence[Unit],
    rounded: Callable[[str, str], np.ndarray],
    folder: Path,
    progress: Callable[[int], None] = lambda units: None,
) -> dict[str, float]:
    """Unit's key → mean KL divergence in nats of the next token's distribution from the float bundle's, over the last
    positions of each sample, when nothing but that unit has rounded weights.

    `rounded(component, layer)` gives the weight [out, in] float32 that takes the float one's place. What was measured
    is kept in `folder`, and not measured again; `progress(1)` after each unit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "sensitivity.json"
    found = _kept(note)
    exchanging = _Exchanging(backend, bundle, folder / "graphs", {unit.component for unit in units})
    with VLM(bundle, exchanging) as vlm:
        runs = [_Run(vlm, sample) for sample in samples]
        for unit in units:
            if unit.key not in found:
                session = exchanging.sessions[unit.component]
                session.exchange({layer: rounded(unit.component, layer) for layer in unit.layers})
                found[unit.key] = float(np.mean([run.divergence(unit.component) for run in runs]))
                session.restore()
                write_whole(note, json.dumps(found))
            progress(1)
    return found


def measure_all(
    bundle: Bundle,
    backend: Backend,
    samples: Sequence[Sample],
    unit: Unit,
    ways: Mapping[str, Callable[[str], np.ndarray]],
    folder: Path,
) -> dict[str, float]:
    """Way → mean KL divergence in nats as `measure`'s, when all layers of `unit` have the weights that the way gives
    them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    exchanging, found = _Exchanging(backend, bundle, folder / "graphs", {unit.component}), {}
    with VLM(bundle, exchanging) as vlm:
        runs, session = [_Run(vlm, sample) for sample in samples], exchanging.sessions[unit.component]
        for way, weight in ways.items():
            session.exchange({layer: weight(layer) for layer in unit.layers})
            found[way] = float(np.mean([run.divergence(unit.component) for run in runs]))
            session.restore()
    shutil.rmtree(folder, ignore_errors=True)
    return found


def along_answers(
    bundle: Bundle,
    backend: Backend,
    samples: Sequence[Sample],
    unit: Unit,
    weight: Callable[[str], np.ndarray],
    folder: Path,
) -> tuple[float, float]:
    """(mean KL divergence in nats along the float bundle's answers, as the proof has it, how often the likeliest token
    stays the same) when all layers of `unit` have the weights [out, in] that `weight` gives by name."""
    exchanging = _Exchanging(backend, bundle, folder / "graphs", {unit.component})
    with VLM(bundle, exchanging) as vlm:
        prompts = [vlm.processor.process(sample.prompt, sample.images) for sample in samples]
        embeds = [vlm.prompt_embeds(prompt) for prompt in prompts]
        answers = [led_tokens(vlm, sample, rows) for sample, rows in zip(samples, embeds, strict=True)]
        asked = [turn for turn in zip(prompts, answers, embeds, strict=True) if len(turn[1])]
        exact = np.concatenate([score(vlm, *turn) for turn in asked])
        session = exchanging.sessions[unit.component]
        session.exchange({layer: weight(layer) for layer in unit.layers})
        found = np.concatenate([score(vlm, *turn) for turn in asked])
    shutil.rmtree(folder, ignore_errors=True)
    return float(divergence(exact, found).mean()), float((exact.argmax(axis=1) == found.argmax(axis=1)).mean())


def _kept(note: Path) -> dict[str, float]:
    """What an earlier attempt measured; nothing where that cannot be read."""
    try:
        return {str(key): float(value) for key, value in json.loads(note.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class _Run:
    """A sample, and its logits with all weights as they are."""

    def __init__(self, vlm: VLM, sample: Sample):
        self._vlm, self._prompt = vlm, vlm.processor.process(sample.prompt, sample.images)
        self._embeds = vlm.prompt_embeds(self._prompt)
        answer = answer_tokens(vlm, sample)
        room = max(vlm.context_length - len(self._embeds), 0)
        self._answer = vlm.embed(answer[:room]) if answer is not None and room > 0 else self._embeds[:0]
        self._exact = self._logits(self._embeds)

    def divergence(self, component: str) -> float:
        """From the exact logits, with the weights as they are now; only `component` has others."""
        seen = self._prompt.pixel_values is not None and component != "decoder"
        if component != "decoder" and not seen:
            return 0.0
        embeds = self._vlm.prompt_embeds(self._prompt) if seen else self._embeds
        return float(divergence(self._exact, self._logits(embeds)).mean())

    def _logits(self, embeds: np.ndarray) -> np.ndarray:
        decoder, tokens = self._vlm.decoder, len(self._answer)
        whole = np.concatenate([embeds, self._answer])
        decoder.reset(len(whole))
        rows = range(max(0, len(whole) - _ROWS), len(whole))
        return decoder.forward(whole, continued(self._prompt.positions, tokens), rows=rows).copy()


class _Exchanging:
    """A backend whose sessions of the components `exchanged` take the weights of their linear layers as inputs; others
    stay as they are, for such weights are in memory twice."""

    def __init__(self, backend: Backend, bundle: Bundle, folder: Path, exchanged: Collection[str]):
        self.name, self.target, self._backend, self._folder = backend.name, backend.target, backend, folder
        self._components = {
            variant.file: name for name, c in bundle.manifest.components.items() for variant in c.variants
        }
        self._exchanged = exchanged
        self.sessions: dict[str, _Session] = {}

    def open(self, path: Path, variant: Variant) -> Session:
        component = self._components[variant.file]
        if component not in self._exchanged:
            return self._backend.open(path, variant)
        self._folder.mkdir(parents=True, exist_ok=True)
        model = ir.load(path)
        weights = {layer.name: _into_input(model.graph, layer.weight) for layer in find_layers(model.graph)}
        graph_file = self._folder / path.name
        ir.save(model, graph_file, external_data=f"{path.name}.data")
        session = _Session(self._backend.open(graph_file, variant), weights)
        self.sessions[component] = session
        return session

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._backend.allocate(shape, dtype)


class _Session:
    """`weights`: layer → the array [in, out] of its input `{layer}.weight`."""

    limits: Mapping[str, int] = {}

    def __init__(self, inner: Session, weights: Mapping[str, np.ndarray]):
        self._inner, self._weights = inner, weights
        self._exchanged: list[str] = []
        self._bind(weights)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._inner.bind(inputs, outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._inner.run(feeds)

    def exchange(self, weights: Mapping[str, np.ndarray]) -> None:
        """Compute with these weights [out, in] until `restore`."""
        self._exchanged = list(weights)
        self._bind({n: np.ascontiguousarray(w.T, self._weights[n].dtype) for n, w in weights.items()})

    def restore(self) -> None:
        self._bind({name: self._weights[name] for name in self._exchanged})

    def _bind(self, weights: Mapping[str, np.ndarray]) -> None:
        self._inner.bind({f"{name}.weight": array for name, array in weights.items()}, {})


def _into_input(graph: ir.Graph, value: ir.Value) -> np.ndarray:
    """Make a stored matrix an input of the graph; returns it."""
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    del graph.initializers[value.name or ""]
    value.const_value, value.type = None, ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.inputs.append(value)
    return array
