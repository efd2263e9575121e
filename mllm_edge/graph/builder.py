"""A thin builder over onnx_ir: nodes are appended in order, weights go straight to the data file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.graph.datafile import DataSink
from mllm_edge.spec import TensorSpec

__all__ = ["MICROSOFT", "GraphBuilder", "save_model", "tensor_specs"]

MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Builds one ONNX graph. Shapes are numbers or symbols (None: not told); an empty input of a node is None.

    `float_type` is that of hidden states and float weights. `contrib` says whether ONNX Runtime's own operators may be
    used; otherwise quantized weights take the standard Q/DQ form.
    """

    def __init__(
        self,
        name: str,
        opset: int,
        data: DataSink,
        float_type: ir.DataType = ir.DataType.FLOAT,
        contrib: bool = False,
    ):
        self._name, self._data = name, data
        self.float_type, self.contrib = float_type, contrib
        self._opsets = {"": opset, **({MICROSOFT: 1} if contrib else {})}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._names: set[str] = set()
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> None:
        """Declare a graph output; the value takes its name."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def weight(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], np.ndarray]
    ) -> ir.Value:
        """An initializer whose array is computed now, written to the data file and dropped."""
        if name not in self._initializers:
            tensor = self._data.add(name, dtype, shape, compute)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor
            )
        return self._initializers[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer held inside the graph; the same name gives the same value."""
        if name not in self._initializers:
            self._initializers[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self._initializers[name]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attrs: Any,
    ) -> ir.Value:
        """Append a node and return its first output, named `name`; see `nodes` for several outputs."""
        return self.nodes(op_type, inputs, name, domain, outputs, **attrs)[0]

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attrs: Any,
    ) -> Sequence[ir.Value]:
        """Append a node and return all its outputs, named `name`, `name.1`, …; a name serves once."""
        assert name not in self._names, f"two nodes are called {name}"
        self._names.add(name)
        node = ir.node(op_type, inputs, attrs, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}.{i}"
        self._nodes.append(node)
        return node.outputs

    @property
    def opset(self) -> int:
        """The standard opset that the nodes so far need."""
        return self._opsets[""]

    def require_opset(self, opset: int) -> None:
        """Raise the standard opset to `opset` if it is lower."""
        self._opsets[""] = max(self._opsets[""], opset)

    def cast(self, x: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """x in `dtype`, without an operator where it is that already (`float_type` and float32 are told apart)."""
        return x if dtype == self.float_type else self.node("Cast", [x], name, to=dtype)

    def inner(self, name: str) -> "GraphBuilder":
        """Builds the body of a loop, whose nodes may read what this builder made; see `graph`. Weights and constants
        are added here, not there."""
        return GraphBuilder(name, self.opset, self._data, self.float_type, self.contrib)

    def splice(self, graph: ir.Graph, node: ir.Node, result: ir.Value, before: Sequence[ir.Node] = ()) -> None:
        """Put the nodes and weights built so far into `graph` in the place of `node`, whose output `result` becomes.

        The nodes `before` it, whose outputs nothing else reads, go too.
        """
        self._register(graph)
        old = [node, *reversed(before)]
        self._rename(graph, old)
        ir.convenience.replace_nodes_and_values(graph, node, old, self._nodes, list(node.outputs), [result])

    def insert(self, graph: ir.Graph, node: ir.Node) -> None:
        """Put the nodes and weights built so far into `graph` before `node`."""
        self._register(graph)
        graph.insert_before(node, self._nodes)

    def _rename(self, graph: ir.Graph, leaving: Sequence[ir.Node]) -> None:
        """Nodes called as one that stays in `graph` get a name of their own."""
        taken = {node.name for node in graph if node not in leaving}
        for node in self._nodes:
            while node.name in taken:
                node.name = f"{node.name}.inner"

    def _register(self, graph: ir.Graph) -> None:
        for value in self._initializers.values():
            if value.name not in graph.initializers:
                graph.register_initializer(value)
        self._share_initializers(graph)

    def _share_initializers(self, graph: ir.Graph) -> None:
        """Constants that an earlier splice put into `graph` under the same name serve this one too."""
        for name, value in self._initializers.items():
            present = graph.initializers[name]
            if present is not value:
                value.replace_all_uses_with(present)

    def graph(self) -> ir.Graph:
        """The finished graph."""
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._opsets,
            name=self._name,
        )

    def model(self) -> ir.Model:
        """The finished model."""
        return ir.Model(self.graph(), ir_version=10, producer_name="mllm-edge")


def save_model(model: ir.Model, path: Path) -> None:
    """Write the graph; weights that are external already stay where they are."""
    ir.save(model, path)


def tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of graph inputs or outputs for the manifest."""
    specs = []
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        specs.append(TensorSpec(value.name, value.dtype.numpy().name, dims))
    return tuple(specs)
