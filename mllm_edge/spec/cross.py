"""What cross-attention looks at, and what its tensors are called."""

import math
from collections.abc import Iterable

import numpy as np

from mllm_edge.spec.model import TensorSpec

__all__ = ["CROSS_BIAS", "CROSS_KV", "CROSS_ROWS", "ENCODED", "cross_bytes", "cross_names", "is_cross"]

CROSS_KV = "cross_kv"  # the component that makes keys and values of what is looked at
ENCODED = "encoder_hidden_states"  # which is this
# Inputs of the decoder with a row for each token: which features it sees, and whether it sees any.
CROSS_BIAS, CROSS_ROWS = "cross_attention_bias", "cross_attention_rows"
_PREFIX = "cross."


def cross_names(layer: int) -> tuple[str, str]:
    """Keys and values of one layer, counted among those with cross-attention: `cross.0.key` and `cross.0.value`."""
    return f"{_PREFIX}{layer}.key", f"{_PREFIX}{layer}.value"


def is_cross(tensor: str) -> bool:
    """Whether an input or output of this name is keys or values of cross-attention."""
    return tensor.startswith(_PREFIX)


def cross_bytes(tensors: Iterable[TensorSpec], features: int) -> int:
    """What those of `tensors` take that are keys and values of so many features, of one sequence."""
    sizes, kept = {"batch": 1, "features": features}, [tensor for tensor in tensors if is_cross(tensor.name)]
    shapes = [[size if isinstance(size, int) else sizes[size] for size in tensor.shape] for tensor in kept]
    return sum(math.prod(s) * np.dtype(t.dtype).itemsize for s, t in zip(shapes, kept, strict=True))
