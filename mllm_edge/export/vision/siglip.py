"""SigLIP-like towers over fixed-size tiles, and the pixel-shuffle connector of Idefics3 and SmolVLM.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR
from mllm_edge.export.vision.modules import (
    ACTIVATIONS,
    Linear,
    Mlp,
    attention,
    packed_attention,
    packed_linear,
    pixel_shuffle,
)

__all__ = [
    "PixelShuffleConnector",
    "SiglipConfig",
    "SiglipEmbeddings",
    "SiglipFeatures",
    "SiglipLayer",
    "SiglipTower",
    "Taps",
    "bounds",
    "position_ids",
    "run_layers",
]


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower. `tile` is the side in px of the square images it sees, `grid` that of the trained positions
    in patches. `projection`: what the layer behind attention is called."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    channels: int
    patch: int
    tile: int
    grid: int
    norm_eps: float
    activation: str
    projection: str = "out_proj"

    @classmethod
    def read(
        cls,
        vision: ConfigReader,
        tile: int | None = None,
        layers: int | None = None,
        inner: int | None = None,
        projection: str = "out_proj",
        size: str = "hidden_size",
    ) -> "SiglipConfig":
        """A tower's settings; `tile`: where it is not `image_size`; `layers`: where not all of them are run; `inner`:
        where no `intermediate_size` is stated; `size`: what its width is called. Raises ConfigError."""
        image, patch = vision.side("image_size"), vision.side("patch_size")
        if tile is not None and tile % patch:
            raise ConfigError(
                f"the image processor makes tiles of {tile} px, no multiple of the vision tower's patch of {patch}",
                OWN_PROCESSOR,
            )
        hidden, heads = vision.heads(size)
        return cls(
            hidden_size=hidden,
            intermediate_size=vision.take("intermediate_size") if inner is None else inner,
            layers=vision.take("num_hidden_layers") if layers is None else layers,
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=patch,
            tile=tile or image,
            grid=image // patch,
            norm_eps=vision.take("layer_norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
            projection=projection,
        )

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch


class SiglipTower(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, patches², hidden_size]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


@dataclass(frozen=True)
class Taps:
    """Which hidden states a model uses: 0 is the first layer's input, i the output of layer i (from 1). `skip` leading
    positions of each are left out."""

    states: tuple[int, ...]
    skip: int = 0

    @classmethod
    def read(cls, top: ConfigReader, layers: int, skip: int = 0) -> "Taps":
        """`vision_feature_layer` of a tower of so many layers, counted from the end where it is negative; raises
        ConfigError for one that there is not."""
        stated = top.take("vision_feature_layer")
        chosen = [stated] if isinstance(stated, int) else list(stated)
        for layer in chosen:
            if not -layers - 1 <= layer <= layers:
                raise ConfigError(
                    f"config.json: vision_feature_layer = {stated!r}, but the tower has {layers} layers",
                    f"choose from {-layers - 1} to {layers}",
                )
        if not chosen or stated == 0:  # the reference takes a plain 0 for none
            raise ConfigError(f"config.json: vision_feature_layer = {stated!r} names no layer", "such as -2, or [0]")
        return cls(tuple(layer % (layers + 1) for layer in chosen), skip)


class SiglipFeatures(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, patches² − skipped, D · taps]: hidden states from
    inside the tower, without its last norm. `config.layers` counts the layers that the taps need."""

    def __init__(self, config: SiglipConfig, taps: Taps):
        super().__init__()
        self.taps = taps
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return run_layers(self.embeddings(pixel_values), self.encoder["layers"], self.taps)


def run_layers(hidden: torch.Tensor, layers: nn.Module, taps: Taps) -> torch.Tensor:
    """hidden [N, S, D] through all layers → the tapped states side by side, [N, S − skip, D · taps]."""
    states = [hidden]
    for layer in layers.children():
        states.append(layer(states[-1]))
    tapped = [states[i][:, taps.skip :] if taps.skip else states[i] for i in taps.states]
    return tapped[0] if len(tapped) == 1 else torch.cat(tapped, dim=-1)


class SiglipEmbeddings(nn.Module):
    """pixel_values [N, C, tile, tile] → patches with their positions [N, patches², D]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch)
        self.positions = nn.Parameter(torch.empty(config.patches**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.positions


class SiglipLayer(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D], of SigLIP and CLIP alike; `bias` as of `attention`."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), bias)
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.projection = config.projection
        self.add_module(config.projection, Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        qkv, width = packed_linear(x, [self.q_proj, self.k_proj, self.v_proj]), x.shape[-1]
        if bias is None:
            seen = packed_attention(qkv, self.heads)
        else:  # slices, because a split is traced to sequences
            query, key, value = (qkv[..., i * width : (i + 1) * width] for i in range(3))
            seen = attention(query, key, value, self.heads, bias)
        return self.get_submodule(self.projection)(seen)


class PixelShuffleConnector(nn.Module):
    """vision_hidden [N, p², D] → image_features [N, p²/s², text_hidden]: s×s neighbouring patches become one token."""

    def __init__(self, patches: int, scale: int, vision_hidden: int, text_hidden: int):
        super().__init__()
        self.patches, self.scale = patches, scale
        projection = Linear(vision_hidden * scale**2, text_hidden, bias=False)
        self.modality_projection = nn.ModuleDict({"proj": projection})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.modality_projection["proj"](pixel_shuffle(hidden, self.patches, self.scale))


def bounds(grid: int) -> tuple[float, ...]:
    """Where the second and later of `grid` trained positions along a side begin, as parts of it, in float32."""
    return tuple(bound for bound in torch.arange(1 / grid, 1.0, 1 / grid).tolist() if bound < 1)  # of some one is 1


def position_ids(patches: int, grid: int) -> np.ndarray:
    """Which trained position [grid²] each patch of a full tile uses: [patches²] int64.

    Idefics2 and its descendants place patch i at i/patches and look the fraction up among the boundaries k/grid in
    float32; the rounding of that arithmetic is part of the trained model, so it is repeated here in the same steps.
    """
    boundaries = torch.tensor(bounds(grid))
    step = 1.0 / torch.tensor(patches)
    fractions = torch.clamp(torch.arange(patches, dtype=torch.float32) * step, max=1.0 - 1e-6)
    buckets = torch.bucketize(fractions, boundaries, right=True)
    return (buckets[:, None] * grid + buckets[None, :]).reshape(-1).numpy()
