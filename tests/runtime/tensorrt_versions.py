"""What the versions of TensorRT that the stand-in plays do not have: names, operators."""

from pathlib import Path
from typing import Any

import onnx

__all__ = ["refused", "without"]

# Operators that TensorRT takes from 10.15 on.
_NEW = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter")


def refused(model: onnx.ModelProto, folder: Path, numbers: tuple[int, ...]) -> list[str]:
    """What the parser of a version says about operators, the opset and scales."""
    nodes, found = model.graph.node, []
    old = numbers < (10, 15)
    for node in nodes:
        if node.domain or (old and node.op_type in _NEW):
            found.append(f"no importer for {node.op_type}")
    quantized = any(node.op_type == "DequantizeLinear" for node in nodes)
    (opset,) = [entry.version for entry in model.opset_import if not entry.domain]
    if old and opset > (21 if quantized else 20):
        found.append(f"opset {opset} is not supported")
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in {node.input[1] for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}:
        if name in values and not (onnx.numpy_helper.to_array(values[name], str(folder)) > 0).all():
            found.append(f"scale {name} must be all positive")
    return found


class _Absent:
    """A name that a version does not have."""

    def __get__(self, owner: Any, kind: Any) -> Any:
        raise AttributeError


def without(kind: type, *names: str, **more: Any) -> Any:
    """A class without these names."""
    return type(kind.__name__, (kind,), {name: _Absent() for name in names} | more)
