"""The tower of Qwen2-VL: images of any size as cells of patches, turned by their places, and its merger.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, Mlp, activate, attention
from mllm_edge.spec import Patchify

__all__ = ["PatchMerger", "QwenVlAttention", "QwenVlConfig", "QwenVlTower"]

_NORM_EPS = 1e-6  # fixed in the reference


@dataclass(frozen=True)
class QwenVlConfig:
    """Sizes of the tower. `patch_values` is the number of values of a flattened patch, `merge` the side of a cell."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    patch_values: int
    merge: int
    norm_eps: float
    activation: str

    @classmethod
    def read(cls, vision: ConfigReader, patches: Patchify) -> "QwenVlConfig":
        """Qwen2-VL's settings; raises ConfigError."""
        hidden, heads = vision.heads("embed_dim", "num_heads", multiple=4)
        return cls(
            hidden_size=hidden,
            intermediate_size=int(hidden * vision.take("mlp_ratio")),
            layers=vision.positive("depth"),
            heads=heads,
            patch_values=vision.require("in_channels", 3) * patches.frames * patches.patch**2,
            merge=patches.merge,
            norm_eps=_NORM_EPS,
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )


class QwenVlTower(nn.Module):
    """One image: pixel_values [cells, merge², patch_values], cos and sin [cells, merge², D/(2·heads)], all float32 →
    vision_hidden [cells, merge², D]."""

    def __init__(self, config: QwenVlConfig):
        super().__init__()
        self.merge = config.merge
        self.patch_embed = nn.ModuleDict({"proj": Linear(config.patch_values, config.hidden_size, bias=False)})
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.layers)])

    def forward(self, pixel_values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = self.patch_embed["proj"](pixel_values.flatten(0, 1).unsqueeze(0))
        # An axis for query and key, one for heads.
        cos, sin = (table.flatten(0, 1).unsqueeze(1).unsqueeze(1) for table in (cos, sin))
        for block in self.blocks:
            hidden = block(hidden, cos, sin)
        return hidden.reshape(-1, self.merge**2, hidden.shape[-1])


class _Block(nn.Module):
    """Pre-norm transformer layer [1, P, D] → [1, P, D]."""

    def __init__(self, config: QwenVlConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = QwenVlAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin)
        return hidden + self.mlp(self.norm2(hidden))


class QwenVlAttention(nn.Module):
    """x [N, S, D], cos and sin [N or none, S, 1, 1, D/(2·heads)], bias as for `attention` → [N, S, D]."""

    def __init__(self, config: QwenVlConfig, bias: bool = True, output_bias: bool = True):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias)
        self.proj = Linear(config.hidden_size, config.hidden_size, output_bias)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        qkv, width = self.qkv(x), x.shape[-1]
        # [N, S, 2, heads, size]. Slices, because a split is traced to sequences.
        both = qkv[..., : 2 * width].unflatten(-1, (2, self.heads, -1))
        half = both.shape[-1] // 2
        first, second = both[..., :half], both[..., half:]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)
        query, key, value = turned[..., :width], turned[..., width:], qkv[..., 2 * width :]
        return self.proj(attention(query, key, value, self.heads, bias))


class PatchMerger(nn.Module):
    """vision_hidden [cells, merge², D] → image_features [cells, text_hidden]: two layers over a cell's patches, side by
    side, after `norm` (D, eps=) of each patch."""

    def __init__(self, config: QwenVlConfig, text_hidden: int, norm: Callable[..., nn.Module] = nn.LayerNorm):
        super().__init__()
        width = config.merge**2 * config.hidden_size
        self.ln_q = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"0": Linear(width, width), "2": Linear(width, text_hidden)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp["2"](activate("gelu", self.mlp["0"](self.ln_q(hidden).flatten(1))))
