"""The image encoder of Segment Anything: most layers look at square windows of the image, all see how far apart two
patches stand in rows and columns.

Parameter names follow transformers where a tensor is used as it is; `sam_derived` makes the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, activate, attention

__all__ = ["SamConfig", "SamEncoder", "SamNeck", "SamTower", "sam_derived"]

_NECK_EPS = 1e-6  # fixed in the reference


@dataclass(frozen=True)
class SamConfig:
    """Sizes of the encoder. `tile` is the side in px of its images, `window` that of a window in patches (0: there
    are none); the layers `whole`, from 0, look at all patches. `outputs` are the channels behind the neck."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    channels: int
    patch: int
    tile: int
    window: int
    whole: tuple[int, ...]
    outputs: int
    norm_eps: float
    activation: str
    qkv_bias: bool

    @classmethod
    def read(cls, vision: ConfigReader) -> "SamConfig":
        """An encoder's settings; raises ConfigError."""
        for key in ("use_abs_pos", "use_rel_pos"):
            vision.require(key, True)
        for unused in ("mlp_ratio", "num_pos_feats", "scale"):  # mlp_dim says it; of the masks' decoder
            vision.take(unused)
        hidden, heads = vision.heads()
        layers, window = vision.positive("num_hidden_layers"), vision.take("window_size", 0)
        whole = tuple(vision.take("global_attn_indexes"))
        if not whole or any(not 0 <= i < layers for i in whole):
            raise ConfigError(f"global_attn_indexes {list(whole)} of {layers} layers", OWN_CONFIG)
        return cls(
            hidden_size=hidden,
            intermediate_size=vision.positive("mlp_dim"),
            layers=layers,
            heads=heads,
            channels=vision.require("num_channels", 3),
            patch=vision.side("patch_size"),
            tile=vision.side("image_size"),
            window=window,
            whole=whole,
            outputs=vision.positive("output_channels"),
            norm_eps=vision.take("layer_norm_eps"),
            activation=vision.require("hidden_act", *ACTIVATIONS),
            qkv_bias=bool(vision.take("qkv_bias")),
        )

    @property
    def patches(self) -> int:
        """Patches along one side of an image."""
        return self.tile // self.patch

    def seen(self, layer: int) -> int:
        """Patches along the side of the square that a layer looks at."""
        return self.patches if layer in self.whole or self.window < 1 else self.window


class _Sam(nn.Module):
    def __init__(self, config: SamConfig):
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"projection": nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch)}
        )
        self.pos_embed = nn.Parameter(torch.empty(1, config.patches, config.patches, config.hidden_size))
        self.layers = nn.ModuleList([_Layer(config, config.seen(i)) for i in range(config.layers)])
        self.neck = SamNeck(config)

    def states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The output of each layer [1, patches, patches, D]."""
        hidden, states = self.patch_embed["projection"](pixel_values).permute(0, 2, 3, 1) + self.pos_embed, []
        for layer in self.layers:
            hidden = layer(hidden)
            states.append(hidden)
        return states


class SamTower(_Sam):
    """pixel_values [1, C, tile, tile] → the neck's output [1, outputs, patches, patches]."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.neck(self.states(pixel_values)[-1])


class SamEncoder(_Sam):
    """pixel_values [1, C, tile, tile] → the neck's output [1, outputs, patches, patches], and the output of the layer
    `tap` [1, patches, patches, D]."""

    def __init__(self, config: SamConfig, tap: int):
        super().__init__(config)
        self.tap = tap

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.states(pixel_values)
        return self.neck(states[-1]), states[self.tap]


class SamNeck(nn.Module):
    """[N, rows, columns, D] → [N, outputs, rows, columns]."""

    def __init__(self, config: SamConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(config.hidden_size, config.outputs, 1, bias=False)
        self.conv2 = nn.Conv2d(config.outputs, config.outputs, 3, padding=1, bias=False)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.outputs, eps=_NECK_EPS) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = _of_channels(self.layer_norm1, self.conv1(hidden.permute(0, 3, 1, 2)))
        return _of_channels(self.layer_norm2, self.conv2(hidden))


def _of_channels(norm: nn.LayerNorm, hidden: torch.Tensor) -> torch.Tensor:
    """The norm over the channels of [N, C, rows, columns]."""
    return norm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Layer(nn.Module):
    """Pre-norm transformer layer [1, rows, columns, D] → the same; patches see those in their square of `side`."""

    def __init__(self, config: SamConfig, side: int):
        super().__init__()
        self.patches, self.side = config.patches, side
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.hidden_size, eps=config.norm_eps) for _ in range(2))
        self.attn = _Attention(config, side)
        self.mlp = _Mlp(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._joined(self.attn(self._squares(self.layer_norm1(hidden))))
        return hidden + self.mlp(self.layer_norm2(hidden))

    def _squares(self, x: torch.Tensor) -> torch.Tensor:
        """[1, rows, columns, D] → [squares, side², D], with zeros behind the last rows and columns. They are seen: the
        trained model computes it so."""
        side, count, width = self.side, -(-self.patches // self.side), x.shape[-1]
        if missing := count * side - self.patches:
            x = nn.functional.pad(x, (0, 0, 0, missing, 0, missing))
        squares = x.reshape(count, side, count, side, width).permute(0, 2, 1, 3, 4)
        return squares.reshape(count**2, side**2, width)

    def _joined(self, squares: torch.Tensor) -> torch.Tensor:
        side, count, width = self.side, -(-self.patches // self.side), squares.shape[-1]
        x = squares.reshape(count, count, side, side, width).permute(0, 2, 1, 3, 4)
        return x.reshape(1, count * side, count * side, width)[:, : self.patches, : self.patches]


class _Attention(nn.Module):
    """[N, side², D] → the same. `rows` and `columns` [side, head size, side] hold, for each place of the query, what a
    distance to each place of the key counts."""

    def __init__(self, config: SamConfig, side: int):
        super().__init__()
        self.heads, self.side, size = config.heads, side, config.hidden_size // config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, config.qkv_bias)
        self.proj = Linear(config.hidden_size, config.hidden_size)
        self.rows, self.columns = (nn.Parameter(torch.empty(side, size, side)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width, qkv = x.shape[-1], self.qkv(x)
        query, key, value = (qkv[..., i * width : (i + 1) * width] for i in range(3))
        return self.proj(attention(query, key, value, self.heads, self._bias(query)))

    def _bias(self, query: torch.Tensor) -> torch.Tensor:
        """[N, heads, side², side²]"""
        n, side = query.shape[0], self.side
        places = query.reshape(n, side, side, self.heads, -1).permute(0, 3, 1, 2, 4)
        rows = places @ self.rows
        columns = (places.transpose(2, 3) @ self.columns).transpose(2, 3)
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).reshape(n, self.heads, side**2, side**2)


class _Mlp(nn.Module):
    def __init__(self, config: SamConfig):
        super().__init__()
        self.activation = config.activation
        self.lin1 = Linear(config.hidden_size, config.intermediate_size)
        self.lin2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(activate(self.activation, self.lin1(x)))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def sam_derived(config: SamConfig, weights: Weights, prefix: str) -> dict[str, Callable[[], np.ndarray]]:
    """An encoder's parameters that are not tensors of a checkpoint, by name; `prefix` is the encoder's there."""
    found: dict[str, Callable[[], np.ndarray]] = {}
    for i in range(config.layers):
        shape = (2 * config.seen(i) - 1, config.hidden_size // config.heads)
        for name, axis in (("rows", "h"), ("columns", "w")):
            table = weights.use(f"{prefix}layers.{i}.attn.rel_pos_{axis}", shape)
            found[f"layers.{i}.attn.{name}"] = partial(_by_places, table)
    return found


def _by_places(table: Callable[[], np.ndarray]) -> np.ndarray:
    """What a table has for each distance [2 · side − 1, D] → for each two places [side, D, side]."""
    distances = table()
    places = np.arange((len(distances) + 1) // 2)
    return distances[places[:, None] - places + len(places) - 1].transpose(0, 2, 1)
