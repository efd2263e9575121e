"""GLM-4V: Qwen2-VL's tower with RMS norms and learned positions, cells that a convolution halves, and a gated merger.

Parameter names follow the checkpoint, so that weights stream in by name; `downsample_derived` makes the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import ACTIVATIONS, GatedMlp, Linear, RmsNorm, activate
from mllm_edge.export.vision.qwen_vl import QwenVlAttention, QwenVlConfig
from mllm_edge.spec import Patchify

__all__ = ["Glm4vConfig", "Glm4vMerger", "Glm4vTower", "downsample_derived"]


@dataclass(frozen=True)
class Glm4vConfig:
    """Sizes of the tower and of the merger behind it, whose inner width is `inner`; learned positions for `grid` ×
    `grid` patches."""

    sizes: QwenVlConfig
    bias: bool
    grid: int
    inner: int

    @classmethod
    def read(cls, vision: ConfigReader, patches: Patchify, outputs: int) -> "Glm4vConfig":
        """The tower's settings; its layers are as wide inside as its `outputs`. Raises ConfigError."""
        hidden, heads = vision.heads("hidden_size", "num_heads", multiple=4)
        sizes = QwenVlConfig(
            hidden_size=hidden,
            intermediate_size=outputs,
            layers=vision.positive("depth"),
            heads=heads,
            patch_values=vision.require("in_channels", 3) * patches.frames * patches.patch**2,
            merge=patches.merge,
            norm_eps=vision.take("rms_norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )
        grid, inner = vision.side("image_size") // patches.patch, vision.positive("intermediate_size")
        return cls(sizes, bool(vision.take("attention_bias")), grid, inner)


class Glm4vTower(nn.Module):
    """One image: pixel_values [cells, merge², patch_values], cos and sin [cells, merge², D/(2·heads)], position_embeds
    [cells, merge², D], all float32 → vision_hidden [cells, merge², D]."""

    def __init__(self, config: Glm4vConfig):
        super().__init__()
        sizes = config.sizes
        self.merge = sizes.merge
        self.patch_embed = nn.ModuleDict({"proj": Linear(sizes.patch_values, sizes.hidden_size)})
        self.post_conv_layernorm, self.post_layernorm = (RmsNorm(sizes.hidden_size, sizes.norm_eps) for _ in range(2))
        self.blocks = nn.ModuleList([_Block(sizes, config.bias) for _ in range(sizes.layers)])

    def forward(
        self, pixel_values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_embeds: torch.Tensor
    ) -> torch.Tensor:
        patches = self.post_conv_layernorm(self.patch_embed["proj"](pixel_values.flatten(0, 1).unsqueeze(0)))
        hidden = patches + position_embeds.flatten(0, 1)
        # An axis for query and key, one for heads.
        cos, sin = (table.flatten(0, 1).unsqueeze(1).unsqueeze(1) for table in (cos, sin))
        for block in self.blocks:
            hidden = block(hidden, cos, sin)
        return self.post_layernorm(hidden).reshape(-1, self.merge**2, hidden.shape[-1])


class _Block(nn.Module):
    """Pre-norm transformer layer [1, P, D] → [1, P, D]."""

    def __init__(self, config: QwenVlConfig, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = (RmsNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attn = QwenVlAttention(config, bias, output_bias=False)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, config.activation, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin)
        return hidden + self.mlp(self.norm2(hidden))


class Glm4vMerger(nn.Module):
    """vision_hidden [cells, merge², D] → image_features [cells, outputs]."""

    def __init__(self, config: Glm4vConfig, outputs: int):
        super().__init__()
        self.downsample = Linear(config.sizes.merge**2 * config.sizes.hidden_size, outputs)
        self.merger = _Merger(outputs, config.inner, config.sizes.activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.merger(self.downsample(hidden.flatten(1)))


class _Merger(GatedMlp):
    """x [.., size] → [.., size]: a layer and its norm before the gated ones."""

    def __init__(self, size: int, inner: int, activation: str):
        super().__init__(size, inner, activation, bias=False)
        self.proj = Linear(size, size, bias=False)
        self.post_projection_norm = nn.LayerNorm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(activate("gelu", self.post_projection_norm(self.proj(x))))


def downsample_derived(
    config: Glm4vConfig, weights: Weights, name: str, outputs: int
) -> dict[str, Callable[[], np.ndarray]]:
    """The convolution `name` over a cell's patches as a linear layer over them, one behind the other."""
    merge, hidden = config.sizes.merge, config.sizes.hidden_size
    stored = weights.use(name, (outputs, hidden, merge, merge))
    return {"downsample.weight": lambda: stored().transpose(0, 2, 3, 1).reshape(outputs, -1)}
