"""The DaViT tower of Florence-2: stages of ever fewer and wider patches, in which every other layer looks at windows of
the image, and the ones between at its channels; and the projection of what it sees.

Parameter names follow transformers where a tensor is used as it is; `projector_derived` makes the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, Mlp, packed_attention

__all__ = ["DavitConfig", "DavitProjector", "DavitStage", "DavitTower", "projector_derived"]


@dataclass(frozen=True)
class DavitStage:
    """One stage: `depth` pairs of layers of `width`, over patches of `patch` places with a stride and zeros around.
    `prenorm`: normalized before the convolution that makes the patches, else behind it."""

    depth: int
    width: int
    patch: int
    stride: int
    padding: int
    prenorm: bool
    heads: int
    groups: int

    def side(self, before: int) -> int:
        """Patches along one side of a square of `before` places."""
        return (before + 2 * self.padding - self.patch) // self.stride + 1


# The fields of `DavitStage`, as the configuration calls them; each is a list of as many values as there are stages.
_LISTS = ("depths", "embed_dim", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads")


@dataclass(frozen=True)
class DavitConfig:
    """Sizes of the tower, and of the tables that its projector adds. `window`: the side in patches of what layers look
    at; `outputs` are the values of a projected feature."""

    channels: int
    stages: tuple[DavitStage, ...]
    window: int
    mlp_ratio: float
    qkv_bias: bool
    activation: str
    outputs: int
    positions: int
    frames: int

    @classmethod
    def read(cls, vision: ConfigReader) -> "DavitConfig":
        """A tower's settings; raises ConfigError."""
        vision.take("drop_path_rate")  # of training
        lists = {key: list(vision.take(key)) for key in (*_LISTS, "num_groups")}
        counts = {len(values) for values in lists.values()}
        if len(counts) != 1 or not all(lists["depths"]):
            raise ConfigError(f"config.json vision_config: depths {lists['depths']} do not fit {lists}", OWN_CONFIG)
        stages = tuple(DavitStage(*values) for values in zip(*lists.values(), strict=True))
        for stage in stages:
            if stage.width % stage.heads or stage.width % stage.groups or stage.width % 2:
                raise ConfigError(
                    f"config.json vision_config: embed_dim {stage.width} does not make {stage.heads} num_heads and "
                    f"{stage.groups} num_groups",
                    OWN_CONFIG,
                )
        return cls(
            channels=vision.require("in_channels", 3),
            stages=stages,
            window=vision.positive("window_size"),
            mlp_ratio=vision.take("mlp_ratio"),
            qkv_bias=bool(vision.take("qkv_bias")),
            activation=vision.require("activation_function", *ACTIVATIONS),
            outputs=vision.positive("projection_dim"),
            positions=vision.positive("max_position_embeddings"),
            frames=vision.positive("max_temporal_embeddings"),
        )

    @property
    def width(self) -> int:
        """Values of a patch behind the last stage."""
        return self.stages[-1].width

    def sides(self, tile: int) -> tuple[int, ...]:
        """Patches along one side of an image of `tile` px, in each stage; raises ConfigError where none are left, or
        more than there are positions."""
        found, side = [], tile
        for stage in self.stages:
            side = stage.side(side)
            found.append(side)
        if min(found) < 1 or side > self.positions:
            raise ConfigError(
                f"config.json vision_config: an image of {tile}×{tile} px has {side} patches along its side, of "
                f"{self.positions} max_position_embeddings",
                "use the config.json and the preprocessor_config.json that belong to this model",
            )
        return tuple(found)


class DavitTower(nn.Module):
    """pixel_values [N, C, tile, tile] → [N, patches, D], the last stage's patches row by row."""

    def __init__(self, config: DavitConfig, tile: int):
        super().__init__()
        before = (config.channels, *(stage.width for stage in config.stages))
        self.convs = nn.ModuleList([_Patches(before[i], stage) for i, stage in enumerate(config.stages)])
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(*(_Pair(config, stage, side) for _ in range(stage.depth)))
                for stage, side in zip(config.stages, config.sides(tile), strict=True)
            ]
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = pixel_values
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            hidden = blocks(conv(hidden))
        return hidden.flatten(2).transpose(1, 2)


class _Patches(nn.Module):
    """[N, C, side, side] → [N, D, fewer, fewer]"""

    def __init__(self, channels: int, stage: DavitStage):
        super().__init__()
        self.prenorm = stage.prenorm
        self.conv = nn.Conv2d(channels, stage.width, stage.patch, stage.stride, stage.padding)
        self.norm = nn.LayerNorm(channels if stage.prenorm else stage.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self._normed(x)) if self.prenorm else self._normed(self.conv(x))

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Pair(nn.Module):
    """[N, D, side, side] → the same"""

    def __init__(self, config: DavitConfig, stage: DavitStage, side: int):
        super().__init__()
        windows = _Windows(config, stage, side)
        channels = _Channels(config, stage, side)
        self.spatial_block = _Layer(config, stage, side, "window_attn", windows)
        self.channel_block = _Layer(config, stage, side, "channel_attn", channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.channel_block(self.spatial_block(hidden))


class _Layer(nn.Module):
    """Attention and MLP, each behind a convolution of neighbours in which channels do not mix."""

    def __init__(self, config: DavitConfig, stage: DavitStage, side: int, name: str, mixer: nn.Module):
        super().__init__()
        self.side, self.name = side, name
        width = stage.width
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.add_module(name, mixer)
        self.ffn = Mlp(width, int(width * config.mlp_ratio), config.activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self._rows(self.conv1(hidden) + hidden)
        hidden = self._image(rows + self.get_submodule(self.name)(self.norm1(rows)))
        rows = self._rows(self.conv2(hidden) + hidden)
        return self._image(rows + self.ffn(self.norm2(rows)))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[N, D, side, side] → [N, side², D]"""
        return x.flatten(2).transpose(1, 2)

    def _image(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(-1, x.shape[-1], self.side, self.side)


class _Windows(nn.Module):
    """[N, side², D] → the same: patches see those in their window."""

    def __init__(self, config: DavitConfig, stage: DavitStage, side: int):
        super().__init__()
        self.side, self.window, self.heads = side, config.window, stage.heads
        self.qkv = Linear(stage.width, 3 * stage.width, config.qkv_bias)
        self.proj = Linear(stage.width, stage.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With zeros behind the last rows and columns, which are seen: the trained model computes it so."""
        side, window, width = self.side, self.window, x.shape[-1]
        count = -(-side // window)
        x = x.reshape(-1, side, side, width)
        if missing := count * window - side:
            x = nn.functional.pad(x, (0, 0, 0, missing, 0, missing))
        x = x.reshape(-1, count, window, count, window, width).permute(0, 1, 3, 2, 4, 5)
        x = self.proj(packed_attention(self.qkv(x.reshape(-1, window**2, width)), self.heads))
        x = x.reshape(-1, count, count, window, window, width).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, count * window, count * window, width)
        return x[:, :side, :side].reshape(-1, side**2, width)


class _Channels(nn.Module):
    """[N, side², D] → the same: each channel sees those of its group, over the whole image."""

    def __init__(self, config: DavitConfig, stage: DavitStage, side: int):
        super().__init__()
        self.groups, self.scale = stage.groups, side**-1.0
        self.qkv = Linear(stage.width, 3 * stage.width, config.qkv_bias)
        self.proj = Linear(stage.width, stage.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width, qkv = x.shape[-1], self.qkv(x)
        # [N, groups, side², D / groups] each
        query, key, value = (self._grouped(qkv[..., i * width : (i + 1) * width]) for i in range(3))
        shares = torch.softmax((query * self.scale).transpose(2, 3) @ key, dim=-1)
        mixed = value @ shares.transpose(2, 3)
        return self.proj(mixed.transpose(1, 2).reshape(-1, x.shape[1], width))

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[1], self.groups, x.shape[2] // self.groups).transpose(1, 2)


class DavitProjector(nn.Module):
    """[N, patches, D] → [N, 1 + patches, outputs]: the mean of all patches, then each. `positions` [patches, D] are
    added to them; `mean` [1, patches] makes a mean of them."""

    def __init__(self, width: int, outputs: int, patches: int):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(patches, width))
        self.mean = nn.Parameter(torch.empty(1, patches))
        self.image_projection = Linear(width, outputs, bias=False)
        self.image_proj_norm = nn.LayerNorm(outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.positions
        features = torch.cat([self.mean @ hidden, hidden], dim=1)
        return self.image_proj_norm(self.image_projection(features))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def projector_derived(
    config: DavitConfig, side: int, weights: Weights, prefix: str
) -> dict[str, Callable[[], np.ndarray]]:
    """A projector's parameters that are not tensors of a checkpoint, by name; `prefix` is the projector's there."""
    columns, rows = (
        weights.use(f"{prefix}image_position_embed.{axis}_embeddings.weight", (config.positions, config.width // 2))
        for axis in ("column", "row")
    )
    frames = weights.use(f"{prefix}visual_temporal_embed.pos_idx_to_embed", (config.frames, config.width))

    def positions() -> np.ndarray:
        """Of columns and rows side by side, and of the first frame, which an image is."""
        of_columns, of_rows = np.tile(columns()[:side], (side, 1)), np.repeat(rows()[:side], side, axis=0)
        return np.concatenate([of_columns, of_rows], axis=1) + frames()[0]

    return {"positions": positions, "mean": lambda: np.full((1, side**2), side**-2.0, np.float32)}
