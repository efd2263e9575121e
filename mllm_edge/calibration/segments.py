"""A component's float graph cut into pieces that run one after another, so that only one is in memory."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mllm_edge.calibration.linears import Layer, find_groups, find_layers

__all__ = ["Segment", "cut", "extract"]

# The residual stream and one more: the sum that its last branch has not joined yet.
_MOST_PASSING = 2


@dataclass(frozen=True)
class Segment:
    """A piece of a graph. `needs`: values that earlier pieces give; `gives`: those that later ones need; `layers`: the
    names of its linear layers; `start` to `stop`: the places of its nodes."""

    needs: tuple[str, ...]
    gives: tuple[str, ...]
    layers: tuple[str, ...]
    start: int = 0
    stop: int = 0


def cut(graph: ir.Graph, most_bytes: int) -> list[Segment]:
    """Pieces with at most `most_bytes` of weights each (more where a piece can't be smaller), cut where few values
    pass and before a weight, and never inside a group or between it and the layer that takes its factors."""
    nodes, layers = list(graph), find_layers(graph)
    passing = _passing(nodes)
    inside = _inside_groups(nodes, layers)
    bounds, held, place = [0], 0, 0
    for i, node in enumerate(nodes):
        own = _weight_bytes(node)
        held += own
        if own and held > most_bytes and place > bounds[-1]:
            bounds.append(place)
            held = sum(_weight_bytes(n) for n in nodes[place : i + 1])
        if 0 < len(passing[i]) <= _MOST_PASSING and i not in inside:
            place = i + 1
    bounds.append(len(nodes))
    owners = {layer.nodes[-1]: layer.name for layer in layers}
    return [
        Segment(
            needs=passing[start - 1] if start else (),
            gives=passing[stop - 1] if stop < len(nodes) else (),
            layers=tuple(owners[node] for node in nodes[start:stop] if node in owners),
            start=start,
            stop=stop,
        )
        for start, stop in itertools.pairwise(bounds)
    ]


def extract(model: ir.Model, segment: Segment, record: Sequence[str], types: Mapping[str, ir.DataType]) -> ir.Model:
    """The piece as a model: its inputs are the graph's own that it reads and what it `needs`, of these `types`; its
    outputs what it gives and the values called in `record`."""
    graph = model.graph
    own = [value.name or "" for value in graph.inputs]
    outputs = list(dict.fromkeys([*segment.gives, *record]))
    part = ir.convenience.extract(graph, [*own, *segment.needs], outputs)
    for value in list(part.inputs):
        dtype = types.get(value.name or "")
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        if not value.uses() and not value.is_graph_output():
            part.inputs.remove(value)
    return ir.Model(part, ir_version=model.ir_version)


def _passing(nodes: Sequence[ir.Node]) -> list[tuple[str, ...]]:
    """Behind each node, the values that came from a weight matrix and are read later. Others (shapes, masks) are cheap
    to compute again."""
    place = {node: i for i, node in enumerate(nodes)}
    last: dict[ir.Value, int] = {}
    derived: set[ir.Value] = set()
    for node in nodes:
        if _weight_bytes(node) or any(value in derived for value in node.inputs):
            derived |= set(node.outputs)
    for value in derived:
        last[value] = max((place[user] for user, _ in value.uses() if user in place), default=-1)
    passing, alive = [], []  # type: list[tuple[str, ...]], list[ir.Value]
    for i, node in enumerate(nodes):
        alive = [v for v in [*alive, *(o for o in node.outputs if o in derived)] if last[v] > i]
        passing.append(tuple(v.name or "" for v in alive))
    return passing


def _inside_groups(nodes: Sequence[ir.Node], layers: Sequence[Layer]) -> set[int]:
    """Places between the first node of a group (or of the layer that takes its factors) and the last."""
    place, by_name = {node: i for i, node in enumerate(nodes)}, {layer.name: layer for layer in layers}
    inside: set[int] = set()
    for group in find_groups(layers):
        taker = [by_name[group.fold.layer]] if group.fold and group.fold.layer else []
        places = [place[node] for layer in (*group.layers, *taker) for node in layer.nodes]
        inside |= set(range(min(places), max(places)))
    return inside


def _weight_bytes(node: ir.Node) -> int:
    """Bytes of the stored matrices that a node reads."""
    stored = [v.const_value for v in node.inputs if v is not None and v.is_initializer() and v.const_value is not None]
    return sum(tensor.nbytes for tensor in stored if len(tensor.shape) > 1)
