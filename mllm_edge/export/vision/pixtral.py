"""Pixtral's tower, for images of any size, and the connector of its successors, which merges neighbouring patches.

Parameter names follow transformers; `pixtral_derived` and `merger_derived` make those that no checkpoint has so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import ACTIVATIONS, GatedMlp, Linear, RmsNorm, activate, attention
from mllm_edge.spec import GridRope

__all__ = ["MergingConnector", "PixtralConfig", "PixtralTower", "merger_derived", "pixtral_derived"]

_NORM_EPS = 1e-5  # fixed in the reference


@dataclass(frozen=True)
class PixtralConfig:
    """Sizes of the tower. `layers` counts the layers that are run."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    channels: int
    patch: int
    theta: float
    activation: str

    @classmethod
    def read(cls, vision: ConfigReader) -> "PixtralConfig":
        """A tower's settings; raises ConfigError."""
        hidden, heads = vision.heads(multiple=4)
        vision.take("image_size")  # the longest side that it was trained with: no parameter depends on it
        stated, rope = vision.take("head_dim", hidden // heads), vision.take("rope_parameters")
        if stated != hidden // heads:
            raise ConfigError(
                f"vision_config: head_dim {stated} of {heads} heads in {hidden}", f"only {hidden // heads} is supported"
            )
        if rope.get("rope_type") != "axial" or set(rope) - {"rope_type", "rope_theta"}:
            raise ConfigError(
                f"vision_config: rope_parameters = {rope!r}", "supported: rope_type axial with a rope_theta"
            )
        return cls(
            hidden_size=hidden,
            intermediate_size=vision.positive("intermediate_size"),
            layers=vision.positive("num_hidden_layers"),
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=vision.side("patch_size"),
            theta=float(rope["rope_theta"]),
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )

    @property
    def rope(self) -> GridRope:
        """By which a head's elements are turned."""
        return GridRope(self.theta, self.hidden_size // self.heads, alternate=True)


class PixtralTower(nn.Module):
    """One image: pixel_values [patches, 1, C · patch²], cos and sin [patches, 1, D/(2·heads)], float32 → vision_hidden
    [patches, 1, D]."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        self.patch_conv = Linear(config.channels * config.patch**2, config.hidden_size, bias=False)
        self.ln_pre = RmsNorm(config.hidden_size, _NORM_EPS)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList([_Layer(config) for _ in range(config.layers)])})

    def forward(self, pixel_values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        # Flattened: ONNX Runtime 1.32 crashes where half-precision patches are transposed before a product and a norm.
        hidden = self.ln_pre(self.patch_conv(pixel_values.flatten(0, 1).unsqueeze(0)))
        cos, sin = (table.unsqueeze(0) for table in (cos, sin))  # an axis for heads is there
        for layer in self.transformer["layers"].children():
            hidden = layer(hidden, cos, sin)
        return hidden.reshape(-1, 1, hidden.shape[-1])


class _Layer(nn.Module):
    """Pre-norm transformer layer [1, P, D] → [1, P, D]."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        self.attention_norm, self.ffn_norm = (RmsNorm(config.hidden_size, _NORM_EPS) for _ in range(2))
        self.attention = _Attention(config)
        self.feed_forward = GatedMlp(config.hidden_size, config.intermediate_size, config.activation, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin)
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class _Attention(nn.Module):
    """x [1, P, D], cos and sin [1, P, 1, D/(2·heads)] → [1, P, D]."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        query, key = (self._turned(part(x), cos, sin) for part in (self.q_proj, self.k_proj))
        return self.o_proj(attention(query, key, self.v_proj(x), self.heads))

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        each = x.unflatten(-1, (self.heads, -1))
        half = each.shape[-1] // 2
        first, second = each[..., :half], each[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)


class MergingConnector(nn.Module):
    """vision_hidden [patches, 1, D] and merged_cells [merged, side²] int64 → image_features [merged, text_hidden]: a
    norm, side × side patches become one of D values, then linear, activation, linear."""

    def __init__(self, side: int, inputs: int, outputs: int, activation: str, bias: bool, norm_eps: float):
        super().__init__()
        self.activation, self.width = activation, side**2 * inputs
        self.norm = RmsNorm(inputs, norm_eps)
        self.patch_merger = nn.ModuleDict({"merging_layer": Linear(self.width, inputs, bias=False)})
        self.linear_1, self.linear_2 = Linear(inputs, outputs, bias), Linear(outputs, outputs, bias)

    def forward(self, hidden: torch.Tensor, merged_cells: torch.Tensor) -> torch.Tensor:
        patches = self.norm(hidden.flatten(0, 1))
        # Selected, not indexed: indexing is traced to operators that half precision does not have everywhere.
        squares = patches.index_select(0, merged_cells.flatten()).reshape(-1, self.width)
        merged = self.patch_merger["merging_layer"](squares)
        return self.linear_2(activate(self.activation, self.linear_1(merged)))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def pixtral_derived(config: PixtralConfig, weights: Weights, prefix: str) -> dict[str, Callable[[], np.ndarray]]:
    """The tower's first layer: a convolution over patches that do not overlap is a linear layer over flattened ones."""
    name, size = "patch_conv.weight", config.hidden_size
    convolution = weights.use(f"{prefix}{name}", (size, config.channels, config.patch, config.patch))
    return {name: lambda: convolution().reshape(size, -1)}


def merger_derived(weights: Weights, prefix: str, side: int, width: int) -> dict[str, Callable[[], np.ndarray]]:
    """The connector's first layer, whose columns a checkpoint has channel by channel, for patch by patch."""
    name = "patch_merger.merging_layer.weight"
    merging = weights.use(f"{prefix}{name}", (width, side**2 * width))
    return {
        name: lambda: np.ascontiguousarray(
            merging().reshape(width, width, side**2).transpose(0, 2, 1).reshape(width, -1)
        )
    }
