"""InternViT, and the connector of InternVL: pixel shuffle, norm, two linear layers.

Parameter names follow transformers, so that weights stream in by name.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.vision.modules import (
    ACTIVATIONS,
    Linear,
    Mlp,
    RmsNorm,
    activate,
    packed_attention,
    packed_linear,
    pixel_shuffle,
)
from mllm_edge.export.vision.siglip import Taps, run_layers

__all__ = ["InternVit", "InternVitConfig", "ShuffleConnector", "shuffled"]

# Of the norms of q and k, whatever the other norms have.
_QK_EPS = 1e-6


@dataclass(frozen=True)
class InternVitConfig:
    """Sizes of the tower. `tile` is the side in px of the square images it sees; `layers` counts the layers that are
    run, `final_norm` says whether a norm follows them, `stack` is the layers' name in the tower."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    channels: int
    patch: int
    tile: int
    norm: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    activation: str
    qkv_bias: bool
    qk_norm: bool
    final_norm: bool
    stack: Literal["encoder.layer", "layers"] = "encoder.layer"

    @classmethod
    def read(cls, vision: ConfigReader, top: ConfigReader) -> "InternVitConfig":
        """A tower's settings, run up to the model's `vision_feature_layer`; raises ConfigError."""
        tile, patch = vision.side("image_size"), vision.side("patch_size")
        hidden, heads = vision.heads()
        if tile % patch:
            raise ConfigError(f"vision_config: image_size {tile} is no multiple of patch_size {patch}", OWN_CONFIG)
        vision.require("use_absolute_position_embeddings", True)
        for unused in ("layer_scale_init_value", "use_mask_token", "hidden_dropout_prob", "projection_dropout"):
            vision.take(unused)  # only for training
        top.require("vision_feature_select_strategy", "default")
        layers, chosen = vision.take("num_hidden_layers"), top.take("vision_feature_layer")
        pooled = vision.take("use_mean_pooling")
        return cls(
            hidden_size=hidden,
            intermediate_size=vision.take("intermediate_size"),
            layers=_layers(chosen, layers),
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=patch,
            tile=tile,
            norm=vision.require("norm_type", "layer_norm", "rms_norm"),
            norm_eps=vision.take("layer_norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
            qkv_bias=bool(vision.take("attention_bias")),
            qk_norm=bool(vision.take("use_qk_norm")),
            final_norm=chosen == -1 and not pooled,
        )

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch


def _layers(chosen: Any, layers: int) -> int:
    """How many layers come before the hidden state that the connector takes."""
    if not isinstance(chosen, int) or not -layers <= chosen <= layers or chosen == 0:
        raise ConfigError(
            f"config.json: the layer of the image features is {chosen!r}, but the tower has {layers} layers",
            f"choose from {-layers} to {layers}, but not 0",
        )
    return chosen % (layers + 1)


def shuffled(ratio: float, patches: int) -> int:
    """Patches along one side of a token, by the connector's `downsample_ratio`; raises ConfigError for one that does
    not divide the `patches` of a tile's side."""
    scale = round(1 / ratio) if ratio else 0
    if not scale or scale * ratio != 1 or patches % scale:
        raise ConfigError(
            f"config.json: downsample_ratio = {ratio!r} does not divide the {patches} patches of a tile's side",
            OWN_CONFIG,
        )
    return scale


class InternVit(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, patches², hidden_size], without the class token.

    `embeddings.positions` [1 + patches², D] holds the class token in its first row, added to that row's position.
    """

    def __init__(self, config: InternVitConfig):
        super().__init__()
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList([_Layer(config) for _ in range(config.layers)])
        if config.stack == "layers":
            self.layers = layers
        else:
            self.encoder = nn.ModuleDict({"layer": layers})
        self.stack = config.stack
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if config.final_norm else None
        self.taps = Taps((config.layers,), skip=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = run_layers(self.embeddings(pixel_values), self.get_submodule(self.stack), self.taps)
        return hidden if self.layernorm is None else self.layernorm(hidden)


class _Embeddings(nn.Module):
    def __init__(self, config: InternVitConfig):
        super().__init__()
        projection = nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
        self.positions = nn.Parameter(torch.empty(1 + config.patches**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings["projection"](pixel_values).flatten(2).transpose(1, 2)
        # A row of zeros for the class token: a constant pad, where expanding a parameter needs the batch size.
        return nn.functional.pad(patches, (0, 0, 1, 0)) + self.positions


class _Layer(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D] whose branches are scaled per channel."""

    def __init__(self, config: InternVitConfig):
        super().__init__()
        self.layernorm_before, self.layernorm_after = _norm(config), _norm(config)
        self.attention = _Attention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)
        self.lambda_1, self.lambda_2 = (nn.Parameter(torch.empty(config.hidden_size)) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.lambda_1 * self.attention(self.layernorm_before(hidden))
        return hidden + self.lambda_2 * self.mlp(self.layernorm_after(hidden))


def _norm(config: InternVitConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RmsNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class _Attention(nn.Module):
    """The norms of q and k, where there are any, span all heads at once."""

    def __init__(self, config: InternVitConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(size, size, config.qkv_bias) for _ in range(3))
        self.projection_layer = Linear(size, size)
        self.q_norm, self.k_norm = (RmsNorm(size, _QK_EPS) if config.qk_norm else None for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_norm is None or self.k_norm is None:
            qkv = packed_linear(x, [self.q_proj, self.k_proj, self.v_proj])
        else:
            qkv = torch.cat([self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)], dim=-1)
        return self.projection_layer(packed_attention(qkv, self.heads))


class ShuffleConnector(nn.Module):
    """vision_hidden [N, p², D] → image_features [N, p²/s², text_hidden]: s × s neighbouring patches become one token of
    s²·D channels, row by row; then norm, linear, activation, linear."""

    def __init__(self, patches: int, scale: int, vision_hidden: int, text_hidden: int, activation: str):
        super().__init__()
        self.patches, self.scale, self.activation = patches, scale, activation
        self.layer_norm = nn.LayerNorm(vision_hidden * scale**2)
        self.linear_1 = Linear(vision_hidden * scale**2, text_hidden)
        self.linear_2 = Linear(text_hidden, text_hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = pixel_shuffle(hidden, self.patches, self.scale)
        return self.linear_2(activate(self.activation, self.linear_1(self.layer_norm(tokens))))
