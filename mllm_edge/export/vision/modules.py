"""Building blocks of the thin vision modules.

`Linear`, `RmsNorm` and `attention` trace to placeholder operators of the domain `mllm_edge`; lowering replaces each by
the form that the target's dialect and the recipe call for. Everything else traces to standard operators.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

__all__ = ["ACTIVATIONS", "DOMAIN", "Linear", "RmsNorm", "activate", "attention", "packed_linear"]

DOMAIN = "mllm_edge"

_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}
# The names that configurations use.
ACTIVATIONS = tuple(_FUNCTIONS)


class Linear(nn.Module):
    """x [..., in] → [..., out]; the weight [out, in] is never touched while tracing."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, [self])


class RmsNorm(nn.Module):
    """x [..., size] / √(mean(x²) + eps) · weight, the mean over the last axis and in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::RmsNorm", (x, self.weight), {"epsilon": self.eps}, dtype=x.dtype, shape=x.shape, version=1
        )


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation `name`, one of ACTIVATIONS, element by element."""
    return _FUNCTIONS[name](x)


def packed_linear(x: torch.Tensor, parts: Sequence[Linear]) -> torch.Tensor:
    """Several layers over the same input as one: x [..., in] → [..., Σ out], biases on all parts or on none."""
    weights = [p.weight for p in parts]
    biases = [p.bias for p in parts if p.bias is not None]
    assert len(biases) in (0, len(parts))
    shape = (*x.shape[:-1], sum(w.shape[0] for w in weights))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Linear", (x, *weights, *biases), {"parts": len(parts)}, dtype=x.dtype, shape=shape, version=1
    )


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Bidirectional attention over packed q, k, v [N, S, 3·D] with scale 1/√(D/heads) → [N, S, D]."""
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention", (qkv,), {"heads": heads}, dtype=qkv.dtype, shape=shape, version=1
    )
