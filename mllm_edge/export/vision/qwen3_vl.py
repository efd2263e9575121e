"""The tower of Qwen3-VL: cells of patches with learned positions and a rope, and a merger for the features of each of
some layers, which are added behind the decoder's first.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, activate
from mllm_edge.export.vision.qwen_vl import QwenVlAttention, QwenVlConfig
from mllm_edge.spec import Patchify

__all__ = ["Qwen3VlConfig", "Qwen3VlTower", "qwen3_merger"]

_NORM_EPS = 1e-6  # fixed in the reference


@dataclass(frozen=True)
class Qwen3VlConfig:
    """Sizes of the tower. `grid`: along a side of the learned positions; `taps`: the layers, from 0 and ascending,
    whose hidden states are merged for the decoder's layers."""

    sizes: QwenVlConfig
    grid: int
    taps: tuple[int, ...]

    @classmethod
    def read(cls, vision: ConfigReader, patches: Patchify) -> "Qwen3VlConfig":
        """A tower's settings; raises ConfigError."""
        hidden, heads = vision.heads("hidden_size", "num_heads", multiple=4)
        layers, taps = vision.positive("depth"), tuple(vision.take("deepstack_visual_indexes", ()))
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < layers for tap in taps):
            raise ConfigError(
                f"vision_config: deepstack_visual_indexes = {list(taps)!r}",
                f"supported: layers of the tower, 0 to {layers - 1}, in ascending order",
            )
        places = vision.positive("num_position_embeddings")
        if math.isqrt(places) ** 2 != places:
            raise ConfigError(f"vision_config: num_position_embeddings = {places}", "only a square grid is supported")
        sizes = QwenVlConfig(
            hidden_size=hidden,
            intermediate_size=vision.positive("intermediate_size"),
            layers=layers,
            heads=heads,
            patch_values=vision.require("in_channels", 3) * patches.frames * patches.patch**2,
            merge=patches.merge,
            norm_eps=_NORM_EPS,
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )
        return cls(sizes, math.isqrt(places), taps)


class Qwen3VlTower(nn.Module):
    """One image: pixel_values [cells, merge², patch_values], cos and sin [cells, merge², D/(2·heads)] and
    position_embeds [cells, merge², D], all float32 → vision_hidden [cells, merge², D] and, for each tap,
    deepstack.{k} [cells, text_hidden]."""

    def __init__(self, config: Qwen3VlConfig, text_hidden: int):
        super().__init__()
        self.config, sizes = config, config.sizes
        self.patch_embed = nn.ModuleDict({"proj": Linear(sizes.patch_values, sizes.hidden_size)})
        self.blocks = nn.ModuleList([_Block(sizes) for _ in range(sizes.layers)])
        self.deepstack_merger_list = nn.ModuleList([_Merger(sizes, text_hidden, by_cell=True) for _ in config.taps])

    def forward(
        self, pixel_values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        hidden = (self.patch_embed["proj"](pixel_values) + position_embeds).flatten(0, 1).unsqueeze(0)
        # An axis for query and key, one for heads.
        cos, sin = (table.flatten(0, 1).unsqueeze(1).unsqueeze(1) for table in (cos, sin))
        added: list[torch.Tensor] = []
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, cos, sin)
            if layer in self.config.taps:
                added.append(self.deepstack_merger_list[len(added)](self._cells(hidden)))
        return (self._cells(hidden), *added)

    def _cells(self, patches: torch.Tensor) -> torch.Tensor:
        """[1, P, D] → [cells, merge², D]."""
        return patches.reshape(-1, self.config.sizes.merge**2, patches.shape[-1])


class _Block(nn.Module):
    """Pre-norm transformer layer [1, P, D] → [1, P, D]."""

    def __init__(self, config: QwenVlConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = QwenVlAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = _Layers(config.hidden_size, config.intermediate_size, config.hidden_size, config.activation)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin)
        return hidden + self.mlp(self.norm2(hidden))


class _Layers(nn.Module):
    """x [.., inputs] → [.., outputs]: two layers and an activation between."""

    def __init__(self, inputs: int, inner: int, outputs: int, activation: str):
        super().__init__()
        self.activation = activation
        self.linear_fc1, self.linear_fc2 = Linear(inputs, inner), Linear(inner, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(activate(self.activation, self.linear_fc1(x)))


class _Merger(nn.Module):
    """[cells, merge², D] → [cells, text_hidden]: two layers over a cell's patches, side by side, after a norm of each
    patch or, `by_cell`, of all of them together."""

    def __init__(self, config: QwenVlConfig, text_hidden: int, by_cell: bool):
        super().__init__()
        width = config.merge**2 * config.hidden_size
        self.by_cell = by_cell
        self.norm = nn.LayerNorm(width if by_cell else config.hidden_size, eps=config.norm_eps)
        self.linear_fc1, self.linear_fc2 = Linear(width, width), Linear(width, text_hidden)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        patches = self.norm(cells.flatten(1)) if self.by_cell else self.norm(cells).flatten(1)
        return self.linear_fc2(activate("gelu", self.linear_fc1(patches)))


def qwen3_merger(config: Qwen3VlConfig, text_hidden: int) -> nn.Module:
    """vision_hidden [cells, merge², D] → image_features [cells, text_hidden]."""
    return _Merger(config.sizes, text_hidden, by_cell=False)
