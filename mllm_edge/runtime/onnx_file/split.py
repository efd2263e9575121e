"""A serialized decoder graph cut into pieces that run one after the other, without the onnx package.

What comes from `inputs_embeds` passes from piece to piece, and only where it is a single tensor: the stream of hidden
states between two branches. All else, made from weights and from other inputs alone (masks, rotary rows, dequantized
weights), is computed in each piece that reads it. Records are copied byte by byte; weights stay in their own file.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.runtime.onnx_file.cost import Node, read_graph
from mllm_edge.runtime.onnx_file.protobuf import encode_bytes, encode_number, fields
from mllm_edge.spec import TensorSpec

__all__ = ["Piece", "partitions"]

_STREAM, _ROWS = "inputs_embeds", "logits_indices"
# Numbers are those of onnx.proto: ModelProto.graph; GraphProto's node, initializer, input, output, value_info.
_GRAPH, _NODE, _WEIGHT, _INPUT, _OUTPUT, _INFO = 7, 1, 5, 11, 12, 13
_NAME_OF = {_WEIGHT: 8, _INPUT: 1, _OUTPUT: 1, _INFO: 1}
_FLOATS = {1: "float32", 10: "float16"}


@dataclass(frozen=True)
class Piece:
    """A part of a graph. `model`: its serialized form, to be read as if it lay where the whole graph lies, for weights
    in other files are named from there. `inputs`, `outputs`: those of the whole graph; `enters`, `leaves`: the tensor
    that the piece before makes, and the one for the piece behind."""

    model: bytes
    inputs: frozenset[str]
    outputs: frozenset[str]
    enters: TensorSpec | None
    leaves: TensorSpec | None
    weight_bytes: int


@dataclass(frozen=True)
class _Cut:
    """The place behind node `stop` − 1, where only `name` passes; `held`: bytes of weights that are read before it."""

    stop: int = 0
    name: str = ""
    held: int = 0


def partitions(path: Path) -> Iterator[tuple[Piece, ...]]:
    """The decoder in one piece, in two, in three and so on, as far as it can be cut: behind any branch, but not behind
    the choice of rows for the head. Of all ways to cut, the one whose heaviest piece is the lightest.

    Raises BundleError when the graph is damaged.
    """
    decoder = _Decoder(path)
    *cuts, end = decoder.cuts()
    for chosen in _lightest(cuts, end):
        yield tuple(decoder.piece(a, b) for a, b in itertools.pairwise([_Cut(), *chosen, end]))


def _lightest(cuts: Sequence[_Cut], end: _Cut) -> Iterator[tuple[_Cut, ...]]:
    """The cuts between one piece, two, three and so on."""
    # The last cut so far → bytes of the heaviest piece, and all cuts so far.
    ways: dict[_Cut, tuple[int, tuple[_Cut, ...]]] = {_Cut(): (0, ())}

    def heaviest(way: tuple[int, tuple[_Cut, ...]]) -> int:
        return way[0]

    def to(cut: _Cut) -> list[tuple[int, tuple[_Cut, ...]]]:
        before = [(last, *way) for last, way in ways.items() if last.stop < cut.stop]
        return [(max(most, cut.held - last.held), (*chosen, cut)) for last, most, chosen in before]

    while ways:
        yield min(to(end), key=heaviest)[1][:-1]
        found = {cut: to(cut) for cut in cuts}
        ways = {cut: min(several, key=heaviest) for cut, several in found.items() if several}


class _Decoder:
    """A graph, its records as they are in the file, and what of it comes from `inputs_embeds`."""

    def __init__(self, path: Path):
        graph, self._file = read_graph(path), path.read_bytes()
        self._nodes, self._weights = graph.nodes, graph.weights
        self._known = {**graph.tensors, **graph.weights}
        self._makers = {name: i for i, node in enumerate(self._nodes) for name in node.outputs if name}
        self._stream = _made_from(_STREAM, self._nodes)
        self._node_records: list[bytes] = []
        self._named: dict[int, dict[str, bytes]] = {number: {} for number in _NAME_OF}
        self._others: list[bytes] = []
        self._read_records()

    def cuts(self) -> list[_Cut]:
        """Where the graph can be cut, and its end."""
        barred = _made_from(_ROWS, self._nodes) | self._named[_OUTPUT].keys() | {_STREAM}
        last = {name: i for i, node in enumerate(self._nodes) for name in node.inputs if name}
        alive, read, held = {_STREAM}, set[str](), 0
        cuts = [_Cut()]
        for i in self._flowing(0, len(self._nodes)):
            new = self._needed([i])[1] - read
            read, held = read | new, held + self._bytes(new)
            alive = {name for name in (*alive, *self._nodes[i].outputs) if last.get(name, -1) > i}
            if len(alive) == 1 and held > cuts[-1].held:
                cuts += [_Cut(i + 1, name, held) for name in alive - barred if self._dtype(name) in _FLOATS]
        whole = all(name in self._stream for name in self._named[_OUTPUT])
        return [*(cuts[1:] if whole else []), _Cut(len(self._nodes), "", held)]

    def piece(self, start: _Cut, end: _Cut) -> Piece:
        """What lies between two cuts."""
        own = self._flowing(start.stop, end.stop)
        beside, read = self._needed(own)
        nodes = sorted({*own, *beside})
        made = {name for i in nodes for name in self._nodes[i].outputs}
        outputs = made & self._named[_OUTPUT].keys()
        records = [encode_bytes(_NODE, self._node_records[i]) for i in nodes]
        for number, names in ((_WEIGHT, read), (_INPUT, read), (_OUTPUT, outputs), (_INFO, made - {end.name})):
            records += [encode_bytes(number, r) for name, r in self._named[number].items() if name in names]
        records += [encode_bytes(_INPUT, self._info(start.name))] if start.name else []
        records += [encode_bytes(_OUTPUT, self._info(end.name))] if end.name else []
        return Piece(
            model=self._model(b"".join([*self._others, *records])),
            inputs=frozenset(read & self._named[_INPUT].keys()),
            outputs=frozenset(outputs),
            enters=self._spec(start.name),
            leaves=self._spec(end.name),
            weight_bytes=self._bytes(read),
        )

    def _flowing(self, start: int, stop: int) -> list[int]:
        """The nodes of the stream between two places."""
        return [i for i in range(start, stop) if not self._stream.isdisjoint(self._nodes[i].outputs)]

    def _needed(self, nodes: Iterable[int]) -> tuple[set[int], set[str]]:
        """The nodes beside the stream that these need, and the graph's inputs and weights that all of them read."""
        found, read = set[int](), set[str]()
        todo = [name for i in nodes for name in self._nodes[i].inputs]
        while todo:
            name = todo.pop()
            maker = self._makers.get(name)
            if maker is None:
                read.add(name)
            elif name not in self._stream and maker not in found:
                found.add(maker)
                todo += self._nodes[maker].inputs
        return found, read

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._weights[name].nbytes for name in names if name in self._weights)

    def _dtype(self, name: str) -> int:
        """The TensorProto.DataType of a tensor of the stream: as it is told, or as that of what it was made from."""
        while name not in self._known:
            node = self._nodes[self._makers[name]]
            if node.kind == "Cast":
                return node.numbers["to"]
            name = next(n for n in node.inputs if n in self._stream)
        return self._known[name].dtype

    def _spec(self, name: str) -> TensorSpec | None:
        """A tensor that passes: its shape is that of the embeddings."""
        return TensorSpec(name, _FLOATS[self._dtype(name)], self._known[_STREAM].shape) if name else None

    def _info(self, name: str) -> bytes:
        """The ValueInfoProto of a tensor that passes."""
        kind = _child(_child(self._named[_INPUT][_STREAM], 2), 1)
        tensor = encode_number(1, self._dtype(name)) + encode_bytes(2, _child(kind, 2))
        return encode_bytes(1, name) + encode_bytes(2, encode_bytes(1, tensor))

    def _read_records(self) -> None:
        graph = _child(self._file, _GRAPH)
        for number, _, whole, content in fields(graph):
            if number == _NODE:
                self._node_records.append(graph[content])
            elif number in _NAME_OF:
                record = graph[content]
                self._named[number][_child(record, _NAME_OF[number]).decode()] = record
            else:
                self._others.append(graph[whole])

    def _model(self, graph: bytes) -> bytes:
        """The file's model with another graph."""
        parts = [(number, self._file[whole]) for number, _, whole, _ in fields(self._file) if number != _GRAPH]
        return b"".join([*(part for _, part in parts), encode_bytes(_GRAPH, graph)])


def _made_from(source: str, nodes: Iterable[Node]) -> set[str]:
    """A tensor, and all that are made from it."""
    found = {source}
    for node in nodes:
        if not found.isdisjoint(node.inputs):
            found.update(filter(None, node.outputs))
    return found


def _child(message: bytes, number: int) -> bytes:
    """The content of a record's first field of that number."""
    return next(message[content] for found, _, _, content in fields(message) if found == number)
