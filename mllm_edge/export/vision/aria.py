"""Aria's connector: learned queries that look at an image's patches.

Parameter names follow transformers, so that weights stream in by name.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import Linear, activate, attention, packed_linear

__all__ = ["AriaConnector", "aria_derived"]

_EPS = 1e-5  # of every norm; fixed in the reference
_ACTIVATION = "gelu_pytorch_tanh"  # fixed in the reference


class AriaConnector(nn.Module):
    """vision_hidden [patches, 1, D] → image_features [queries, H].

    Linear layers with nothing between them are one here, and `query` holds the queries as attention takes them."""

    def __init__(self, size: int, heads: int, queries: int, hidden_size: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(queries, size))
        self.key, self.value, self.out = (Linear(size, size) for _ in range(3))
        self.cross_attn = nn.ModuleDict({"layer_norm_kv": nn.LayerNorm(size, eps=_EPS)})
        self.layer_norm = nn.LayerNorm(size, eps=_EPS)
        widths = {"linear_in": (size, hidden_size), "linear_out": (hidden_size, hidden_size)}
        self.feed_forward = nn.ModuleDict({name: Linear(*sizes, bias=False) for name, sizes in widths.items()})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        context = self.cross_attn["layer_norm_kv"](hidden.transpose(0, 1))
        pairs, size = packed_linear(context, [self.key, self.value]), hidden.shape[-1]
        seen = self.out(attention(self.query.unsqueeze(0), pairs[..., :size], pairs[..., size:], self.heads))
        inner = activate(_ACTIVATION, self.feed_forward["linear_in"](self.layer_norm(seen)))
        return self.feed_forward["linear_out"](inner).squeeze(0)


def aria_derived(
    weights: Weights, prefix: str, size: int, stored: int, queries: int
) -> Mapping[str, Callable[[], np.ndarray]]:
    """The connector's parameters that the checkpoint has as two layers or more, of `stored` queries the first."""
    square, row = (size, size), (size,)
    cross = f"{prefix}cross_attn."
    query = weights.use(f"{prefix}query", (stored, size))
    scale, shift = (weights.use(f"{cross}layer_norm.{part}", row) for part in ("weight", "bias"))
    first = {part: weights.use(f"{cross}{part}_proj.weight", square) for part in "qkv"}
    second = weights.use(f"{cross}multihead_attn.in_proj_weight", (3 * size, size))
    biases = weights.use(f"{cross}multihead_attn.in_proj_bias", (3 * size,))
    out, out_bias = (
        weights.use(f"{cross}multihead_attn.out_proj.{part}", shape)
        for part, shape in (("weight", square), ("bias", row))
    )
    last, last_bias = (
        weights.use(f"{cross}linear.{part}", shape) for part, shape in (("weight", square), ("bias", row))
    )

    def both(part: str) -> np.ndarray:
        return np.split(second(), 3)["qkv".index(part)] @ first[part]()

    def bias(part: str) -> np.ndarray:
        return np.split(biases(), 3)["qkv".index(part)]

    def looking() -> np.ndarray:
        rows = query()[:queries]
        centered = rows - rows.mean(axis=1, keepdims=True)
        normed = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + np.float32(_EPS))
        return (normed * scale() + shift()) @ both("q").T + bias("q")

    return {
        "query": looking,
        "key.weight": lambda: both("k"),
        "key.bias": lambda: bias("k"),
        "value.weight": lambda: both("v"),
        "value.bias": lambda: bias("v"),
        "out.weight": lambda: last() @ out(),
        "out.bias": lambda: last() @ out_bias() + last_bias(),
    }
