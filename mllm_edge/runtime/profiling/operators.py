"""Where the time of a call goes, operator by operator, by the profiler of ONNX Runtime or of TensorRT."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import TENSORRT, Backend
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_layers import LayerTimes, Runs, layer_kind
from mllm_edge.runtime.onnx_file.cost import read_graph
from mllm_edge.runtime.prompt.image import ImageSource
from mllm_edge.runtime.prompt.processor import Messages
from mllm_edge.runtime.trace import in_order
from mllm_edge.runtime.vlm import VLM

__all__ = ["Operator", "by_kind", "by_layer", "profile_operators", "top"]

_SUFFIX = "_kernel_time"
_LOOP = "Scan"  # its time is that of the nodes in it, which are listed too
_EVENTS = 1_000_000  # ONNX Runtime drops those beyond, with no word in the profile
_LAYER = re.compile(r"(?<!\w)(?:layers?|blocks?)\.(\d+)(?!\w)")


@dataclass(frozen=True)
class Operator:
    """One node of a graph in one stage, or what TensorRT made of several, or a group, which has no `name`.

    `kind`: the operator's type, "" in a group by layer. `layer`: the transformer layer, None outside of them, in a
    group by kind, and where it is not told: between layers, and for nodes that the engine made. `calls` and `seconds`
    are those of one call to the model; `share` is of the time of all operators of the stage, 0 to 1.
    """

    stage: str
    kind: str
    layer: int | None
    name: str
    calls: int
    seconds: float
    share: float


def profile_operators(
    path: str | Path,
    prompt: Messages,
    images: Iterable[ImageSource] = (),
    *,
    new_tokens: int = 32,
    threads: int | None = None,
    target: str = "cpu",
    speculation: int = 0,
) -> tuple[Operator, ...]:
    """Every node that one warm call runs, by stage and then by time, the longest first. `target`: cpu, or one of
    TensorRT's, whose engines are built first where there are none; what it leaves to the CPU is not among them.
    `speculation` as in `VLM.stream`.

    Stages: the components but the decoder, whose runs are prefill or decode. The profiler slows small operators down:
    the shares say where to look, and how long a stage takes is measured without it.

    Raises what `VLM.load` and `VLM.stream` raise, and BackendError when there are more events than the profiler holds.
    """
    bundle = Bundle.load(path)
    pictures = list(images)
    times: LayerTimes = {}
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        backend = _timed(target, times) if target in TENSORRT else OnnxRuntimeCpu(threads, profiles=Path(folder))
        with VLM(bundle, backend, threads=threads, notice=lambda text: None) as vlm:
            options: dict[str, Any] = {"ignore_eos": True, "speculation": speculation}
            warm, measured = (
                vlm.generate(prompt, pictures, max_new_tokens=tokens, **options).metrics.decode_steps
                for tokens in (min(2, new_tokens), new_tokens)
            )
        files = {name: bundle.variant(name, target).file for name in bundle.manifest.components}
        if target in TENSORRT:
            paths = {name: bundle.listed(file) for name, file in files.items() if times.get(file)}
            events = {name: list(_layer_events(times[files[name]], path)) for name, path in paths.items()}
        else:
            events = {name: _events(Path(folder), Path(file).name) for name, file in files.items()}
    operators: list[Operator] = []
    for name, listed in events.items():
        steps = (warm, measured) if name == "decoder" else (0, 0)
        prefill, decode = _last_call(listed, *steps)
        layers = _layers(listed)
        operators += _operators("prefill" if name == "decoder" else name, prefill, layers)
        operators += _operators("decode", decode, layers)
    return _sorted(operators)


def by_kind(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators of one stage and type together."""
    return _grouped(operators, lambda operator: replace(operator, layer=None, name=""))


def by_layer(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators of one stage and layer together; those of no layer make one group."""
    return _grouped(operators, lambda operator: replace(operator, kind="", name=""))


def top(operators: Sequence[Operator], count: int) -> tuple[Operator, ...]:
    """The `count` longest of each stage."""
    stages = dict.fromkeys(operator.stage for operator in operators)
    return tuple(o for stage in stages for o in [o for o in operators if o.stage == stage][:count])


def _events(folder: Path, file: str) -> list[dict[str, Any]]:
    """A component's runs and the nodes they ran, in order; each run comes before its nodes."""
    (profile,) = folder.glob(f"{file}_*.json")
    events = json.loads(profile.read_text(encoding="utf-8"))
    if len(events) >= _EVENTS:
        raise BackendError(f"{file}: this call makes more than the {_EVENTS:,} events of a profile", "use a smaller -n")
    ours = [e for e in events if _is_run(e) or (e["name"].endswith(_SUFFIX) and e["args"]["op_name"] != _LOOP)]
    return sorted(ours, key=lambda e: (e["ts"], not _is_run(e)))


def _timed(target: str, times: LayerTimes) -> Backend:
    from mllm_edge.runtime.backends.tensorrt import TensorRT

    return TensorRT(target, layers=times)


def _layer_events(engines: Sequence[Runs], graph: Path) -> Iterator[dict[str, Any]]:
    """What TensorRT told, in the form of ONNX Runtime's events; layers are numbered in the order they first ran. A run
    of a decoder in segments is one of each of their engines, whose layers may have the same names."""
    kinds = {node.name: node.kind for node in read_graph(graph).nodes}
    numbers: dict[tuple[int, str], int] = {}
    for runs in zip(*engines, strict=True):
        yield {"name": "model_run"}
        for engine, run in enumerate(runs):
            for layer, seconds in run:
                number = numbers.setdefault((engine, layer), len(numbers))
                facts = {"op_name": layer_kind(layer, kinds), "node_index": number}
                yield {"name": f"{layer}{_SUFFIX}", "dur": seconds * 1e6, "args": facts}


def _last_call(events: Sequence[dict[str, Any]], warm: int, measured: int) -> tuple[list, list]:
    """Nodes of the second of two calls, before its decode steps and in them; the calls made `warm` and `measured`."""
    runs: list[list[dict[str, Any]]] = []
    for event in events:
        if _is_run(event):
            runs.append([])
        else:
            runs[-1].append(event)
    before = (len(runs) - warm - measured) // 2  # as many in each
    call = runs[before + warm :]
    return list(chain(*call[:before])), list(chain(*call[before:]))


def _layers(events: Sequence[dict[str, Any]]) -> Mapping[str, int | None]:
    """Node → layer: by its name or, where that has none, by the names around it if those agree."""
    names = list(dict.fromkeys(_node(e) for e in events if not _is_run(e)))  # as the first run has them
    told = [set(_LAYER.findall(name.partition(" ")[2])) for name in names]
    own = [int(found.pop()) if len(found) == 1 else None for found in told]  # what spans several is of none
    return dict(zip(names, (_filled(own, i) for i in range(len(own))), strict=True))


def _filled(layers: Sequence[int | None], index: int) -> int | None:
    if layers[index] is not None:
        return layers[index]
    before = next((layer for layer in reversed(layers[:index]) if layer is not None), None)
    after = next((layer for layer in layers[index:] if layer is not None), None)
    return before if before == after else None


def _operators(stage: str, events: Sequence[dict[str, Any]], layers: Mapping[str, int | None]) -> tuple[Operator, ...]:
    nodes: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        nodes.setdefault(_node(event), []).append(event)
    took = {node: sum(e["dur"] for e in found) for node, found in nodes.items()}  # µs
    total = sum(took.values()) or 1
    return tuple(
        Operator(
            stage=stage,
            kind=found[0]["args"]["op_name"],
            layer=layers[node],
            name=node.partition(" ")[2],
            calls=len(found),
            seconds=took[node] / 1e6,
            share=took[node] / total,
        )
        for node, found in nodes.items()
    )


def _grouped(operators: Sequence[Operator], key: Callable[[Operator], Operator]) -> tuple[Operator, ...]:
    groups: dict[Operator, list[Operator]] = {}
    for operator in operators:
        groups.setdefault(replace(key(operator), calls=0, seconds=0.0, share=0.0), []).append(operator)
    sums = (
        replace(
            group,
            calls=sum(o.calls for o in found),
            seconds=sum(o.seconds for o in found),
            share=sum(o.share for o in found),
        )
        for group, found in groups.items()
    )
    return _sorted(sums)


def _sorted(operators: Iterable[Operator]) -> tuple[Operator, ...]:
    """By stage, in the order they run, and then by time."""
    found = list(operators)
    stages = {stage: place for place, stage in enumerate(in_order(operator.stage for operator in found))}
    return tuple(sorted(found, key=lambda operator: (stages[operator.stage], -operator.seconds)))


def _is_run(event: Mapping[str, Any]) -> bool:
    return event["name"] == "model_run"


def _node(event: Mapping[str, Any]) -> str:
    """Number and name: nodes that ONNX Runtime makes share their names."""
    return f"{event['args']['node_index']} {event['name'].removesuffix(_SUFFIX)}"
