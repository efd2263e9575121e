"""SigLIP 2 of images in their own aspect ratio (NaFlex), and LFM2-VL's connector.

Parameter names follow transformers, so that weights stream in by name.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, activate
from mllm_edge.export.vision.siglip import SiglipConfig, SiglipLayer

__all__ = ["CellConnector", "CellConnectorConfig", "Siglip2Tower", "read_siglip2"]


def read_siglip2(vision: ConfigReader) -> SiglipConfig:
    """A tower's settings; `grid` is the side of the learned positions, `tile` that of an image which fills them. Raises
    ConfigError."""
    patch, places = vision.side("patch_size"), vision.positive("num_patches")
    grid = math.isqrt(places)
    if grid**2 != places:
        raise ConfigError(f"vision_config: num_patches {places} is no square of positions", OWN_CONFIG)
    hidden, heads = vision.heads()
    vision.take("vision_use_head")  # its output is not used
    return SiglipConfig(
        hidden_size=hidden,
        intermediate_size=vision.positive("intermediate_size"),
        layers=vision.positive("num_hidden_layers"),
        heads=heads,
        channels=vision.require("num_channels", 3),
        patch=patch,
        tile=grid * patch,
        grid=grid,
        norm_eps=vision.take("layer_norm_eps"),
        activation=vision.require("hidden_act", *ACTIVATIONS),
    )


class Siglip2Tower(nn.Module):
    """A slice of an image: pixel_values [cells, merge², patch² · C] and position_embeds [cells, merge², D] float32 →
    vision_hidden [cells, merge², D], behind a last norm where `normed`. A patch is [patch, patch, C], flattened."""

    def __init__(self, config: SiglipConfig, merge: int, normed: bool = True):
        super().__init__()
        self.merge = merge
        patch_embedding = Linear(config.channels * config.patch**2, config.hidden_size)
        self.embeddings = nn.ModuleDict({"patch_embedding": patch_embedding})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if normed else None

    def forward(self, pixel_values: torch.Tensor, position_embeds: torch.Tensor) -> torch.Tensor:
        cells = self.embeddings["patch_embedding"](pixel_values) + position_embeds
        hidden = cells.flatten(0, 1).unsqueeze(0)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        if self.post_layernorm is not None:
            hidden = self.post_layernorm(hidden)
        return hidden.reshape(-1, self.merge**2, hidden.shape[-1])


@dataclass(frozen=True)
class CellConnectorConfig:
    """Sizes of the connector of cells of merge × merge patches."""

    vision_hidden: int
    merge: int
    inner: int
    text_hidden: int
    activation: str
    bias: bool
    norm: bool

    @classmethod
    def read(cls, top: ConfigReader, vision_hidden: int, text_hidden: int) -> "CellConnectorConfig":
        """LFM2-VL's settings; raises ConfigError."""
        return cls(
            vision_hidden=vision_hidden,
            merge=top.positive("downsample_factor"),
            inner=top.positive("projector_hidden_size"),
            text_hidden=text_hidden,
            activation=top.require("projector_hidden_act", *ACTIVATIONS),
            bias=bool(top.take("projector_bias")),
            norm=bool(top.take("projector_use_layernorm")),
        )


class CellConnector(nn.Module):
    """vision_hidden [cells, merge², D] → image_features [cells, text_hidden]: a cell's patches, row by row, become one
    token of merge² · D channels; then a norm (where there is one), linear, activation, linear."""

    def __init__(self, config: CellConnectorConfig):
        super().__init__()
        width = config.merge**2 * config.vision_hidden
        self.activation = config.activation
        self.layer_norm = nn.LayerNorm(width) if config.norm else None
        self.linear_1 = Linear(width, config.inner, config.bias)
        self.linear_2 = Linear(config.inner, config.text_hidden, config.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(1)
        if self.layer_norm is not None:
            tokens = self.layer_norm(tokens)
        return self.linear_2(activate(self.activation, self.linear_1(tokens)))
