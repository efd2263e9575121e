"""Granite-Docling's tower, features of some of whose layers are added behind the decoder's first, and its connector.

Parameter names follow the checkpoint; `granite_docling_derived` makes those that no checkpoint has so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.internvit import ShuffleConnector
from mllm_edge.export.vision.modules import Linear, activate, pixel_shuffle
from mllm_edge.export.vision.siglip import SiglipConfig, SiglipEmbeddings, SiglipLayer

__all__ = ["GraniteDoclingConfig", "GraniteDoclingConnector", "GraniteDoclingTower", "granite_docling_derived"]

_TEMPERATURE = 10000.0  # of the positions; fixed in the reference


@dataclass(frozen=True)
class GraniteDoclingConfig:
    """Sizes of tower and connector: `scale` × `scale` patches become one feature of `outputs` values. `taps`: the
    layers, from 0 and ascending, whose hidden states become features for the decoder's layers."""

    tower: SiglipConfig
    scale: int
    outputs: int
    taps: tuple[int, ...]

    @classmethod
    def read(cls, vision: ConfigReader) -> "GraniteDoclingConfig":
        """A tower's settings; raises ConfigError."""
        tower, scale, taps = SiglipConfig.read(vision), vision.positive("scale_factor"), vision.take(_TAPS, ())
        if tower.patches % scale:
            raise ConfigError(
                f"vision_config: scale_factor {scale} does not divide the {tower.patches} patches of a tile's side",
                OWN_CONFIG,
            )
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < tower.layers for tap in taps):
            raise ConfigError(
                f"vision_config: {_TAPS} = {list(taps)!r}",
                f"supported: layers of the tower, 0 to {tower.layers - 1}, in ascending order",
            )
        outputs = vision.positive("out_hidden_size")
        if outputs % 4:
            raise ConfigError(f"vision_config: out_hidden_size {outputs} is no multiple of 4", OWN_CONFIG)
        return cls(tower, scale, outputs, tuple(taps))

    @property
    def tokens(self) -> int:
        """Features of a tile."""
        return (self.tower.patches // self.scale) ** 2


_TAPS = "deepstack_visual_indexes"


class GraniteDoclingTower(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, patches², hidden_size] and, for each tap,
    deepstack.{k} [N, tokens, outputs]."""

    def __init__(self, config: GraniteDoclingConfig):
        super().__init__()
        self.taps, sizes = config.taps, config.tower
        self.embeddings = SiglipEmbeddings(sizes)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(sizes) for _ in range(sizes.layers)])})
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        mergers = nn.ModuleList(
            [
                ShuffleConnector(sizes.patches, config.scale, sizes.hidden_size, config.outputs, "gelu")
                for _ in config.taps
            ]
        )
        self.connector = nn.ModuleDict({"coarse": nn.ModuleDict({"deepstack_mergers": mergers})})

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, states = self.embeddings(pixel_values), []
        for i, layer in enumerate(self.encoder["layers"].children()):
            hidden = layer(hidden)
            if i in self.taps:
                states.append(hidden)
        mergers = self.get_submodule("connector.coarse.deepstack_mergers").children()
        return (self.post_layernorm(hidden), *(merge(state) for merge, state in zip(mergers, states, strict=True)))


class GraniteDoclingConnector(nn.Module):
    """vision_hidden [N, patches², hidden_size] → image_features [N, tokens, outputs]: scale × scale patches become one
    feature, with a position in its tile, between norms."""

    def __init__(self, config: GraniteDoclingConfig):
        super().__init__()
        size, outputs = config.tower.hidden_size, config.outputs
        self.patches, self.scale = config.tower.patches, config.scale
        self.ln_in, self.ln_mid, self.ln_out = nn.LayerNorm(size), nn.LayerNorm(outputs), nn.LayerNorm(outputs)
        self.coarse = nn.ModuleDict({"projection": Linear(size * config.scale**2, outputs, bias=False)})
        self.positions = nn.Parameter(torch.empty(config.tokens, outputs))
        self.mlp_fc2 = Linear(outputs, outputs, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        merged = self.coarse["projection"](pixel_shuffle(self.ln_in(hidden), self.patches, self.scale))
        return self.ln_out(self.mlp_fc2(activate("gelu", self.ln_mid(merged + self.positions))))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def granite_docling_derived(
    config: GraniteDoclingConfig, weights: Weights, prefix: str, factor: float
) -> dict[str, Callable[[], np.ndarray]]:
    """The connector's parameters that are not tensors of a checkpoint: positions, and its last norm, times the `factor`
    that the decoder multiplies all its inputs with. `prefix` is the connector's there."""
    scale, bias = (weights.use(f"{prefix}ln_out.{part}", (config.outputs,)) for part in ("weight", "bias"))
    return {
        "positions": lambda: _positions(config.tower.patches // config.scale, config.outputs),
        "ln_out.weight": lambda: scale() * np.float32(factor),
        "ln_out.bias": lambda: bias() * np.float32(factor),
    }


def _positions(side: int, width: int) -> np.ndarray:
    """Sines and cosines of a feature's column, then of its row, [side², width] float32."""
    turns = _TEMPERATURE ** -(np.arange(width // 4) / (width // 4))
    rows, cols = (places.reshape(-1, 1) * turns for places in np.indices((side, side)))
    parts = [function(angles) for angles in (cols, rows) for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
