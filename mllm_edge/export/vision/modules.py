"""Building blocks of the thin vision modules.

`Linear`, `RmsNorm` and `attention` trace to placeholder operators of the domain `mllm_edge`; lowering replaces each by
the form that the target's dialect and the recipe call for. Everything else traces to standard operators.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

__all__ = [
    "ACTIVATIONS",
    "DOMAIN",
    "GatedMlp",
    "Linear",
    "Mlp",
    "RmsNorm",
    "activate",
    "attention",
    "channels_first",
    "packed_attention",
    "packed_linear",
    "pixel_shuffle",
]

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


class Mlp(nn.Module):
    """x [..., size] → [..., size]: two layers with `inner` values and an activation, one of ACTIVATIONS, between."""

    def __init__(self, size: int, inner: int, activation: str):
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2 = Linear(size, inner), Linear(inner, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(activate(self.activation, self.fc1(x)))


class GatedMlp(nn.Module):
    """x [..., size] → [..., size]: down(act(gate(x)) · up(x)), `inner` values between."""

    def __init__(self, size: int, inner: int, activation: str, bias: bool = True):
        super().__init__()
        self.activation = activation
        self.gate_proj, self.up_proj = Linear(size, inner, bias), Linear(size, inner, bias)
        self.down_proj = Linear(inner, size, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activate(self.activation, self.gate_proj(x)) * self.up_proj(x))


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation `name`, one of ACTIVATIONS, element by element."""
    return _FUNCTIONS[name](x)


def channels_first(weight: np.ndarray, patch: int) -> np.ndarray:
    """The weight [out, patch² · C] of a layer on patches: columns for pixels of neighbouring channels become those for
    channels one behind the other."""
    pixels = weight.reshape(len(weight), patch, patch, -1)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(weight.shape)


def pixel_shuffle(hidden: torch.Tensor, patches: int, scale: int) -> torch.Tensor:
    """hidden [N, patches², D] → [N, (patches / scale)², scale² · D]: scale × scale neighbours side by side."""
    side, width = patches // scale, hidden.shape[-1]
    grid = hidden.view(-1, side, scale, side, scale, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, scale * scale * width)


def packed_linear(x: torch.Tensor, parts: Sequence[Linear]) -> torch.Tensor:
    """Several layers over the same input as one: x [..., in] → [..., Σ out], biases on all parts or on none."""
    weights = [p.weight for p in parts]
    biases = [p.bias for p in parts if p.bias is not None]
    assert len(biases) in (0, len(parts))
    shape = (*x.shape[:-1], sum(w.shape[0] for w in weights))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Linear", (x, *weights, *biases), {"parts": len(parts)}, dtype=x.dtype, shape=shape, version=1
    )


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of query [N, S, D] over key and value [N, L, D], of as many heads → [N, S, D]. `bias` [N or 1, 1 or
    heads, S, L] is added to the scores; `scale` multiplies them (None: 1/√(D/heads))."""
    scale = (query.shape[-1] // heads) ** -0.5 if scale is None else scale
    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        inputs,
        {"heads": heads, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def packed_attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """As `attention` of q, k, v that lie side by side, [N, S, 3·D] → [N, S, D]."""
    width = qkv.shape[-1] // 3
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        (qkv,),
        {"heads": heads, "scale": (width // heads) ** -0.5},
        dtype=qkv.dtype,
        shape=(*qkv.shape[:-1], width),
        version=1,
    )
