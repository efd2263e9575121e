"""Linear layers of a float graph: where they are, what feeds them, and where a factor of their input can be hidden."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

__all__ = ["Fold", "Group", "Layer", "find_groups", "find_layers"]

# Norms → the inputs that scale and shift what they return.
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """y = x · weight [in, out] + bias. `nodes` are the product, the cast before it and the sum behind it, where there
    are such; `y` is the value of the last."""

    name: str
    shape: tuple[int, int]
    x: ir.Value
    y: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def stored_bytes(self) -> int:
        """Of the weight in its file."""
        assert self.weight.const_value is not None
        return self.weight.const_value.nbytes

    def read_weight(self) -> np.ndarray:
        """The weight [out, in] float32."""
        return _read(self.weight).T

    def read_bias(self) -> np.ndarray:
        """The bias [out] float32."""
        assert self.bias is not None
        return _read(self.bias)


@dataclass(frozen=True)
class Fold:
    """Where 1/s goes when the layers of a group have their weights multiplied by s: into a norm's weights (`tensors`),
    or the rows of the layer whose output is multiplied into their input (`layer`)."""

    kind: Literal["norm", "layer"]
    tensors: tuple[str, ...] = ()
    layer: str = ""


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share an input."""

    x: ir.Value
    layers: tuple[Layer, ...]
    fold: Fold | None

    @property
    def width(self) -> int:
        """Channels of the input."""
        return self.layers[0].shape[1]


def find_layers(graph: ir.Graph) -> list[Layer]:
    """Every product with a stored matrix called `{layer}.weight`, in the graph's order."""
    found = (_layer(node) for node in graph if node.op_type == "MatMul" and not node.domain)
    return [layer for layer in found if layer is not None]


def find_groups(layers: Iterable[Layer]) -> list[Group]:
    """The layers by the value they read, in order of the first of each."""
    layers = list(layers)
    by_input: dict[ir.Value, list[Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.x, []).append(layer)
    outputs = {layer.y: layer for layer in layers}
    return [Group(x, tuple(group), _fold(x, group, outputs)) for x, group in by_input.items()]


def _layer(product: ir.Node) -> Layer | None:
    x, weight = product.inputs
    assert x is not None
    assert weight is not None
    nodes = [product]
    cast = weight.producer()
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        weight, nodes = cast.inputs[0], [cast, product]
    stored = weight.const_value
    if stored is None or len(stored.shape) != 2 or not (weight.name or "").endswith(".weight"):
        return None
    columns, rows = stored.shape.numpy()
    total, bias = _sum_behind(product.outputs[0], rows)
    if total is not None:
        nodes.append(total)
    name = (weight.name or "").removesuffix(".weight")
    return Layer(name, (rows, columns), x, nodes[-1].outputs[0], weight, bias, tuple(nodes))


def _sum_behind(value: ir.Value, rows: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The node that adds a stored bias to `value`, if nothing else reads it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None, None
    node, index = uses[0]
    other = node.inputs[1 - index] if node.op_type == "Add" and not node.domain else None
    if other is None or other.const_value is None or tuple(other.const_value.shape) != (rows,):
        return None, None
    return node, other


def _fold(x: ir.Value, group: Sequence[Layer], outputs: dict[ir.Value, Layer]) -> Fold | None:
    """A place for 1/s, when nothing but the group would notice."""
    readers = {node for node, _ in x.uses()}
    own = {node for layer in group for node in layer.nodes}
    producer = x.producer()
    if producer is None or not readers <= own or x.is_graph_output():
        return None
    if producer.op_type in _NORMS:
        weights = [producer.inputs[i] for i in _NORMS[producer.op_type] if i < len(producer.inputs)]
        present = [value for value in weights if value is not None]
        if all(value.const_value is not None and len(list(value.uses())) == 1 for value in present):
            return Fold("norm", tuple(value.name or "" for value in present))
    if producer.op_type == "Mul" and not producer.domain:
        for factor in producer.inputs:
            if factor in outputs and len(list(factor.uses())) == 1:
                return Fold("layer", layer=outputs[factor].name)
    return None


def _read(value: ir.Value) -> np.ndarray:
    """A stored tensor as float32. Read, not mapped: mapped pages count as the process's own memory."""
    stored = value.const_value
    assert stored is not None
    if not isinstance(stored, ir.ExternalTensor):
        return stored.numpy().astype(np.float32)
    shape = stored.shape.numpy()
    values = np.fromfile(stored.path, stored.dtype.numpy(), math.prod(shape), offset=stored.offset or 0)
    return values.reshape(shape).astype(np.float32)
