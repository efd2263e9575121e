"""The tower of Llama 3.2 Vision: the tiles of one image as one sequence, through local layers and gated global ones.

Parameter names follow transformers where a tensor is used as it is; `mllama_derived` makes the others, into which the
gates are folded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, Mlp, attention
from mllm_edge.runtime.backends.base import HIDDEN

__all__ = ["MllamaConfig", "MllamaTower", "mllama_derived"]

Readers = Mapping[str, Callable[[], np.ndarray]]
_EMBEDDING_EPS = 1e-5  # of the norms around the local layers; fixed in the reference
_MULTIPLE = 8  # to which a tile's patches are padded; fixed in the reference


@dataclass(frozen=True)
class MllamaConfig:
    """Sizes of the tower. `tile` is the side in px of a tile, `tiles` their number; `taps` are the local layers, from
    0, whose outputs join that of the last global layer. `aspect_ratios`: rows and columns of tiles; an image's
    aspect_ratio_id is its place among them, from 1."""

    hidden_size: int
    intermediate_size: int
    layers: int
    global_layers: int
    heads: int
    channels: int
    patch: int
    tile: int
    tiles: int
    taps: tuple[int, ...]
    aspect_ratios: tuple[tuple[int, int], ...]
    norm_eps: float
    activation: str

    @classmethod
    def read(cls, vision: ConfigReader) -> "MllamaConfig":
        """A tower's settings; raises ConfigError."""
        hidden, heads = vision.heads(heads="attention_heads")
        layers, tiles = vision.positive("num_hidden_layers"), vision.positive("max_num_tiles")
        taps = tuple(vision.take("intermediate_layers_indices"))
        if not taps or any(not -layers <= tap < layers for tap in taps):
            raise ConfigError(f"vision_config: intermediate_layers_indices {list(taps)} of {layers} layers", OWN_CONFIG)
        ratios = tuple((rows, cols) for rows, cols in vision.take("supported_aspect_ratios"))
        if any(rows * cols > tiles for rows, cols in ratios):
            raise ConfigError(f"vision_config: supported_aspect_ratios need more than {tiles} tiles", OWN_CONFIG)
        config = cls(
            hidden_size=hidden,
            intermediate_size=vision.positive("intermediate_size"),
            layers=layers,
            global_layers=vision.positive("num_global_layers"),
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=vision.side("patch_size"),
            tile=vision.side("image_size"),
            tiles=tiles,
            taps=taps,
            aspect_ratios=ratios,
            norm_eps=vision.take("norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )
        stated = vision.take("vision_output_dim")
        if stated != config.width:
            raise ConfigError(
                f"vision_config: vision_output_dim {stated}, but the last layer's and {len(taps)} further states make "
                f"{config.width}",
                OWN_CONFIG,
            )
        return config

    @property
    def patches(self) -> int:
        """Positions of a tile: its class token and its patches."""
        return 1 + (self.tile // self.patch) ** 2

    @property
    def padded(self) -> int:
        """Positions of a tile inside the tower."""
        return -(-self.patches // _MULTIPLE) * _MULTIPLE

    @property
    def width(self) -> int:
        """Channels of the tower's output."""
        return self.hidden_size * (1 + len(self.taps))


class MllamaTower(nn.Module):
    """One image: pixel_values [tiles, C, tile, tile] float32, those it does not have zero, and aspect_ratio_id [1]
    int64 → vision_hidden [tiles, patches, width]: the output of the last global layer, then, for each channel, the
    tapped states.

    `positions` [patches, D] holds the class token in its first row, added to that row's position. `padding` [ids,
    tiles · padded] is 1 for what shows nothing of the image, else 0. Such positions do not see each other, but the
    others see them: the trained model computes it so.
    """

    def __init__(self, config: MllamaConfig):
        super().__init__()
        self.config, size, ids = config, config.hidden_size, 1 + len(config.aspect_ratios)
        self.patch_embedding = nn.Conv2d(config.channels, size, config.patch, config.patch, bias=False)
        self.positions = nn.Parameter(torch.empty(config.patches, size))
        self.tile_positions = nn.Parameter(torch.empty(ids, config.tiles * config.patches * size))
        self.before, self.between = (nn.Parameter(torch.empty(ids, config.tiles * size)) for _ in range(2))
        self.padding = nn.Parameter(torch.empty(ids, config.tiles * config.padded))
        self.layernorm_pre, self.layernorm_post = (nn.LayerNorm(size, eps=_EMBEDDING_EPS) for _ in range(2))
        self.transformer = _encoder(config, config.layers)
        self.global_transformer = _encoder(config, config.global_layers)

    def forward(self, pixel_values: torch.Tensor, aspect_ratio_id: torch.Tensor) -> torch.Tensor:
        config = self.config
        hidden, bias = self._embedded(pixel_values, aspect_ratio_id), self._bias(aspect_ratio_id)
        states = []
        for layer in self.transformer["layers"].children():
            hidden = layer(hidden, bias)
            states.append(hidden)
        tiles = self._tiles(self.layernorm_post(hidden)) + self._of_tiles(self.between, aspect_ratio_id)
        hidden = tiles.reshape(1, -1, config.hidden_size)
        for layer in self.global_transformer["layers"].children():
            hidden = layer(hidden, bias)
        found = self._tiles(hidden)[:, : config.patches]
        tapped = torch.stack([self._tiles(states[i])[:, : config.patches] for i in config.taps], dim=-1)
        return torch.cat([found, tapped.flatten(2)], dim=-1)

    def _embedded(self, pixel_values: torch.Tensor, aspect_ratio_id: torch.Tensor) -> torch.Tensor:
        """The first local layer's input [1, tiles · padded, D]."""
        config = self.config
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        patches = patches + self._of_tiles(self.before, aspect_ratio_id)
        chosen = self.tile_positions.index_select(0, aspect_ratio_id)
        places = self.positions + chosen.reshape(config.tiles, config.patches, config.hidden_size)
        # A row of zeros for the class token, whose value is among the positions.
        hidden = self.layernorm_pre(nn.functional.pad(patches, (0, 0, 1, 0)) + places)
        padded = nn.functional.pad(hidden, (0, 0, 0, config.padded - config.patches))
        return padded.reshape(1, -1, config.hidden_size)

    def _bias(self, aspect_ratio_id: torch.Tensor) -> torch.Tensor:
        """[1, 1, tiles · padded, tiles · padded]"""
        padding = self.padding.index_select(0, aspect_ratio_id)
        return (padding.unsqueeze(-1) * (padding * HIDDEN).unsqueeze(-2)).unsqueeze(1)

    def _of_tiles(self, table: torch.Tensor, aspect_ratio_id: torch.Tensor) -> torch.Tensor:
        """What a table has for each tile of an image, [tiles, 1, D]."""
        return table.index_select(0, aspect_ratio_id).reshape(self.config.tiles, 1, self.config.hidden_size)

    def _tiles(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, tiles · padded, D] → [tiles, padded, D]."""
        return hidden.reshape(self.config.tiles, self.config.padded, self.config.hidden_size)


def _encoder(config: MllamaConfig, layers: int) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([_Layer(config) for _ in range(layers)])})


class _Layer(nn.Module):
    """Pre-norm transformer layer [1, S, D] → [1, S, D]."""

    def __init__(self, config: MllamaConfig):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.norm_eps) for _ in range(2)
        )
        self.self_attn = _Attention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), bias)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Attention(nn.Module):
    def __init__(self, config: MllamaConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.o_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, bias))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def mllama_derived(config: MllamaConfig, weights: Weights, prefix: str) -> Readers:
    """The tower's parameters that are not tensors of a checkpoint, by name; `prefix` is the tower's there."""
    size, tiles, patches, ids = config.hidden_size, config.tiles, config.patches, 1 + len(config.aspect_ratios)
    use, places = _Gated(weights, prefix), "gated_positional_embedding"
    of_tiles = f"{places}.tile_embedding.weight", (ids, tiles * patches * size)
    found: dict[str, Callable[[], np.ndarray]] = {
        "positions": use.positions(places, (patches, size)),
        "tile_positions": use.times(*of_tiles, f"{places}.gate"),
        "padding": partial(_padding, config),
    }
    for name, table in (("before", "pre_tile_positional_embedding"), ("between", "post_tile_positional_embedding")):
        found[name] = use.times(f"{table}.embedding.weight", (ids, tiles * size), f"{table}.gate")
    for i in range(config.global_layers):
        layer = f"global_transformer.layers.{i}"
        shapes = {
            "self_attn.o_proj.weight": ((size, size), "gate_attn"),
            "mlp.fc2.weight": ((size, config.intermediate_size), "gate_ffn"),
            "mlp.fc2.bias": ((size,), "gate_ffn"),
        }
        for name, (shape, by) in shapes.items():
            found[f"{layer}.{name}"] = use.times(f"{layer}.{name}", shape, f"{layer}.{by}")
    return found


@dataclass(frozen=True)
class _Gated:
    """Tensors of a checkpoint, multiplied by what a gate lets through: its tanh."""

    weights: Weights
    prefix: str

    def read(self, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        return self.weights.use(self.prefix + name, shape)

    def times(self, name: str, shape: tuple[int, ...], gate: str) -> Callable[[], np.ndarray]:
        tensor, opening = self.read(name, shape), self.read(gate, (1,))
        return lambda: np.tanh(opening()) * tensor()

    def positions(self, name: str, shape: tuple[int, int]) -> Callable[[], np.ndarray]:
        """The plain positions get what the gate holds back; the class token stands in the first."""
        table, opening = self.read(f"{name}.embedding", shape), self.read(f"{name}.gate", (1,))
        token = self.read("class_embedding", shape[1:])

        def positions() -> np.ndarray:
            found = (1 - np.tanh(opening())) * table()
            found[0] += token()
            return found

        return positions


def _padding(config: MllamaConfig) -> np.ndarray:
    """[ids, tiles · padded] float32. Id 0, of no image, is taken for one tile."""
    counts = np.array([1, *(rows * cols for rows, cols in config.aspect_ratios)])
    missing = np.arange(config.tiles) >= counts[:, None]
    behind = np.arange(config.padded) >= config.patches
    return (missing[:, :, None] | behind).reshape(len(counts), -1).astype(np.float32)
