"""Ovis 2: a tower after AIMv2, and features that are mixtures of the rows of a table, a word each.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.vision.modules import (
    ACTIVATIONS,
    GatedMlp,
    Linear,
    RmsNorm,
    packed_attention,
    packed_linear,
    pixel_shuffle,
)

__all__ = ["Ovis2Config", "Ovis2Tower", "VisualWords"]


@dataclass(frozen=True)
class Ovis2Config:
    """Sizes of the tower. `tile` is the side in px of its images; `stride` × `stride` patches become one feature, of
    `words` weights."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    channels: int
    patch: int
    tile: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    mlp_bias: bool
    stride: int
    words: int

    @classmethod
    def read(cls, vision: ConfigReader) -> "Ovis2Config":
        """A tower's settings; raises ConfigError."""
        hidden, heads = vision.heads()
        vision.require("tokenize_function", "softmax")
        patches, stride = vision.side("image_size") // vision.side("patch_size"), vision.positive("hidden_stride")
        if patches % stride:  # transformers fails where it would have to fill up
            raise ConfigError(f"hidden_stride = {stride} of {patches} patches along a side", OWN_CONFIG)
        return cls(
            hidden_size=hidden,
            intermediate_size=vision.positive("intermediate_size"),
            layers=vision.positive("num_hidden_layers"),
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=vision.side("patch_size"),
            tile=vision.side("image_size"),
            norm_eps=vision.take("rms_norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
            qkv_bias=bool(vision.take("qkv_bias")),
            mlp_bias=bool(vision.take("mlp_bias")),
            stride=stride,
            words=vision.positive("vocab_size") - vision.take("num_visual_indicator_tokens"),
        )

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def side(self) -> int:
        """Features along one side of a tile."""
        return self.patches // self.stride


class Ovis2Tower(nn.Module):
    """pixel_values [N, C, tile, tile] → vision_hidden [N, side², stride² · D]: neighbouring patches side by side."""

    def __init__(self, config: Ovis2Config):
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([_Layer(config) for _ in range(config.layers)])})
        self.rms_norm = RmsNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        return pixel_shuffle(self.rms_norm(hidden), self.config.patches, self.config.stride)


class _Embeddings(nn.Module):
    def __init__(self, config: Ovis2Config):
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch)
        self.rms_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.positions = nn.Parameter(torch.empty(config.patches**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.rms_norm(self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)) + self.positions


class _Layer(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D]."""

    def __init__(self, config: Ovis2Config):
        super().__init__()
        self.rms_norm1, self.rms_norm2 = (RmsNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attention = _Attention(config)
        self.ffn = GatedMlp(config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.rms_norm1(hidden))
        return hidden + self.ffn(self.rms_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, config: Ovis2Config):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.hidden_size, config.hidden_size, config.qkv_bias) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(packed_attention(packed_linear(x, [self.q_proj, self.k_proj, self.v_proj]), self.heads))


class VisualWords(nn.Module):
    """vision_hidden [N, S, inputs] → image_features [N, S, outputs]: a mixture of `words` rows of a table, in the
    shares that a softmax gives. `words.weight` is the table turned, [outputs, words]."""

    def __init__(self, inputs: int, words: int, outputs: int):
        super().__init__()
        head = {"head_linear": Linear(inputs, words, bias=False), "head_norm": nn.LayerNorm(words)}
        self.vision_tower = nn.ModuleDict(head)
        self.words = Linear(words, outputs, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.vision_tower["head_norm"](self.vision_tower["head_linear"](hidden))
        return self.words(torch.softmax(logits, dim=-1))
