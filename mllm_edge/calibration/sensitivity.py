"""What rounding a few layers alone does to the next token's distribution, measured through the shipping runtime."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.evaluate import LED_TOKENS, divergence, led_tokens
from mllm_edge.calibration.linears import Layer, find_layers
from mllm_edge.files import write_whole
from mllm_edge.runtime.backends.base import Backend, Session
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.machine.cpu import give_back_memory
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import Variant

__all__ = ["Asked", "Recorded", "Turn", "Unit", "affordable", "answered", "measure", "measure_ways"]

_MOST_SAMPLES = 4
# Parameters times runs: some minutes on two cores for prompts of a few hundred tokens.
_MOST_WORK = 2e11


@dataclass(frozen=True)
class Unit:
    """Layers of a component that are rounded together."""

    component: str
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.component}: {self.layers[0]}"


@dataclass(frozen=True, eq=False)
class Turn:
    """A prompt, also as the decoder gets it, and the ids [n] of the answer along which distributions are compared."""

    prompt: Prompt
    encoded: Encoded
    answer: np.ndarray


@dataclass(frozen=True)
class Recorded:
    """The decoder's `runs` over prompts with their answers, as `collect.record` left their inputs in `feeds`: no
    picture is looked at again."""

    feeds: Feeds
    runs: tuple[int, ...]


Asked = Callable[[VLM], list[Turn]]


def affordable(units: int, parameters: float, most: int = _MOST_SAMPLES) -> int:
    """On how many samples so many units of a model can be measured; 0 for models too large for any."""
    return min(most, int(_MOST_WORK / max(units * parameters, 1.0)))


def answered(samples: Sequence[Sample]) -> Asked:
    """The samples and their answers: their own, or the model's greedy ones. Empty ones are left out."""

    def turns(vlm: VLM) -> list[Turn]:
        prompts = [vlm.processor.process(sample.prompt, sample.images) for sample in samples]
        encoded = [vlm.encode(prompt) for prompt in prompts]
        led = led_tokens(vlm, samples, encoded)
        return [Turn(*found) for found in zip(prompts, encoded, led, strict=True) if len(found[2])]

    return turns


def measure(
    bundle: Bundle,
    backend: Backend,
    asked: Asked,
    units: Sequence[Unit],
    rounded: Callable[[str, str], np.ndarray],
    folder: Path,
    progress: Callable[[int], None] = lambda units: None,
) -> dict[str, float]:
    """Unit's key → mean KL divergence in nats of the next token's distribution from the float bundle's, along the
    answers, when nothing but that unit has rounded weights.

    `rounded(component, layer)` gives the weight [out, in] float32 that takes the float one's place. What was measured
    is kept in `folder`, and not measured again; `progress(1)` after each unit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "sensitivity.json"
    found = _kept(note)
    exchanging = _Exchanging(backend, bundle, folder / "graphs", {unit.component for unit in units})
    with VLM(bundle, exchanging) as vlm:
        turns = asked(vlm)
        exact = [_logits(vlm, turn) for turn in turns]
        for unit in units:
            if unit.key not in found:
                session = exchanging.sessions[unit.component]
                session.exchange(unit.layers, partial(rounded, unit.component))
                losses = [_loss(vlm, unit.component, *pair) for pair in zip(turns, exact, strict=True)]
                found[unit.key] = float(np.mean(losses)) if losses else 0.0
                session.restore()
                write_whole(note, json.dumps(found))
            progress(1)
    shutil.rmtree(folder / "graphs", ignore_errors=True)
    give_back_memory()
    return found


def measure_ways(
    bundle: Bundle,
    backend: Backend,
    asked: Asked | Recorded,
    unit: Unit,
    ways: Mapping[str, Callable[[str], np.ndarray]],
    folder: Path,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Way → (KL divergence in nats, whether the likeliest token stays the same) at each position of the answers, as the
    proof has them, when all layers of the decoder's `unit` have the weights [out, in] that the way gives them by name.
    Empty where no prompt leaves room for an answer.
    """
    exchanging, found = _Exchanging(backend, bundle, folder / "graphs", {unit.component}), {}
    with _scores(bundle, exchanging, asked) as scores:
        session = exchanging.sessions[unit.component]
        exact = [score() for score in scores]
        if not scores:
            return {way: (np.zeros(0), np.zeros(0, bool)) for way in ways}
        with ThreadPoolExecutor(1) as pool:
            for way, weight in ways.items():
                session.exchange(unit.layers, weight)
                # One by one, beside the next run: of all together, distributions in double precision are half a
                # gigabyte.
                pairs = zip(scores, exact, strict=True)
                compared = [pool.submit(_compared, logits, score()) for score, logits in pairs]
                kl, same = (np.concatenate(part) for part in zip(*(each.result() for each in compared), strict=True))
                found[way] = kl, same
                session.restore()
    shutil.rmtree(folder, ignore_errors=True)
    give_back_memory()
    return found


@contextmanager
def _scores(
    bundle: Bundle, exchanging: "_Exchanging", asked: Asked | Recorded
) -> Iterator[Sequence[Callable[[], np.ndarray]]]:
    """What each of the answers is given with the weights as they are when it is called: logits [n, V]."""
    if isinstance(asked, Recorded):
        variant = bundle.variant("decoder", exchanging.target)
        session = exchanging.open(bundle.listed(variant.file), variant)
        yield [partial(_logits_of_run, session, variant, asked.feeds, run) for run in asked.runs]
        return
    with VLM(bundle, exchanging) as vlm:
        yield [partial(_logits, vlm, turn) for turn in asked(vlm)]


def _logits_of_run(session: Session, variant: Variant, feeds: Feeds, run: int) -> np.ndarray:
    """Along the answer of a recorded run; the row behind its end tells nothing."""
    (logits,) = session.run(feeds.read(run, [v.name for v in variant.inputs]))["logits"]
    return logits[:-1][:LED_TOKENS].copy()


def _loss(vlm: VLM, component: str, turn: Turn, exact: np.ndarray) -> float:
    """Mean divergence from the `exact` logits, with the weights as they are now; only `component` has others."""
    if component != "decoder" and turn.prompt.pixel_values is None:
        return 0.0
    return float(divergence(exact, _logits(vlm, turn, again=component != "decoder")).mean())


def _compared(exact: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(divergence in nats, whether the likeliest token is the same) of each row."""
    return divergence(exact, logits), exact.argmax(axis=1) == logits.argmax(axis=1)


def _logits(vlm: VLM, turn: Turn, again: bool = False) -> np.ndarray:
    """Along the answer; the pictures are looked at `again`."""
    return vlm.score(vlm.encode(turn.prompt) if again else turn.encoded, turn.answer)


def _kept(note: Path) -> dict[str, float]:
    """What an earlier attempt measured; nothing where that cannot be read."""
    try:
        return {str(key): float(value) for key, value in json.loads(note.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class _Exchanging:
    """A backend whose sessions of some `components` take the weights of their linear layers as inputs."""

    def __init__(self, backend: Backend, bundle: Bundle, folder: Path, components: Set[str]):
        self.name, self.target, self._backend, self._folder = backend.name, backend.target, backend, folder
        self._exchanged = components
        self._components = {
            variant.file: name for name, c in bundle.manifest.components.items() for variant in c.variants
        }
        self.sessions: dict[str, _Session] = {}

    def open(self, path: Path, variant: Variant) -> Session:
        component = self._components[variant.file]
        if component not in self._exchanged:
            return self._backend.open(path, variant)
        self._folder.mkdir(parents=True, exist_ok=True)
        model = ir.load(path)
        weights = {layer.name: _into_input(model.graph, layer) for layer in find_layers(model.graph)}
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

    def exchange(self, layers: Sequence[str], weight: Callable[[str], np.ndarray]) -> None:
        """Compute with the weights [out, in] that `weight` gives by name until `restore`; one at a time is in memory
        as it comes."""
        self._exchanged = list(layers)
        for name in layers:
            self._bind({name: np.ascontiguousarray(weight(name).T, self._weights[name].dtype)})

    def restore(self) -> None:
        self._bind({name: self._weights[name] for name in self._exchanged})

    def _bind(self, weights: Mapping[str, np.ndarray]) -> None:
        self._inner.bind({f"{name}.weight": array for name, array in weights.items()}, {})


def _into_input(graph: ir.Graph, layer: Layer) -> np.ndarray:
    """Make a layer's stored matrix an input of the graph, in the type that it is computed in; returns it."""
    value, cast = layer.weight, layer.nodes[0]
    assert value.const_value is not None
    dtype = value.const_value.dtype
    if cast.op_type == "Cast":  # of a constant it is made once, of an input at each run
        dtype = ir.DataType(cast.attributes["to"].as_int())
        cast.outputs[0].replace_all_uses_with(value)
        graph.remove(cast, safe=True)
    del graph.initializers[value.name or ""]
    array = layer.read_weight().T.astype(dtype.numpy(), copy=False)
    value.const_value, value.type = None, ir.TensorType(dtype)
    graph.inputs.append(value)
    return array
