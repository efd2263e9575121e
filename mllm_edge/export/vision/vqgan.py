"""The encoder of a VQ-GAN: convolutions in residual blocks, groups of channels normalized, and the nearest code.

Parameter names follow transformers, so that weights stream in by name; `codebook_derived` makes the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights

__all__ = ["GROUPS", "NORM_EPS", "Codebook", "VqBlock", "VqConfig", "VqEncoder", "codebook_derived", "halved"]

GROUPS, NORM_EPS = 32, 1e-6  # fixed in the reference
_TOGETHER = 8192  # codes that are looked at in one piece: all of Emu3's and an image's places take gigabytes


@dataclass(frozen=True)
class VqConfig:
    """Sizes of the encoder. `widths` are the channels at each resolution, the first that of the image, each the half of
    the one before; `attends`: at which of them attention stands behind each block. `codes` of `code_size` elements."""

    channels: int
    side: int
    widths: tuple[int, ...]
    first: int
    blocks: int
    latent: int
    code_size: int
    codes: int
    attends: tuple[bool, ...]
    attends_last: bool

    @classmethod
    def read(cls, vision: ConfigReader) -> "VqConfig":
        """An encoder's settings; raises ConfigError."""
        first, factors = vision.positive("base_channels"), list(vision.take("channel_multiplier"))
        widths = tuple(first * factor for factor in factors)
        side, resolutions = vision.positive("resolution"), vision.take("attn_resolutions") or []
        attention = vision.require("attn_type", "vanilla", "none", None) == "vanilla"
        vision.take("dropout")  # of training
        vision.require("double_latent", False)
        if not widths or any(width % GROUPS for width in (first, *widths)) or side % 2 ** (len(widths) - 1):
            raise ConfigError(
                f"vq_config: base_channels {first} times channel_multiplier {factors} in {GROUPS} groups, resolution "
                f"{side} halved {len(widths) - 1} times",
                OWN_CONFIG,
            )
        return cls(
            channels=vision.require("in_channels", 3),
            side=side,
            widths=widths,
            first=first,
            blocks=vision.positive("num_res_blocks"),
            latent=vision.positive("latent_channels"),
            code_size=vision.positive("embed_dim"),
            codes=vision.positive("num_embeddings"),
            attends=tuple(attention and side // 2**i in resolutions for i in range(len(widths))),
            attends_last=attention,
        )

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return (self.side // 2 ** (len(self.widths) - 1)) ** 2


class VqEncoder(nn.Module):
    """pixel_values [N, C, side, side] → vision_hidden [N, latent, rows, columns]."""

    def __init__(self, config: VqConfig):
        super().__init__()
        before = (config.first, *config.widths)
        levels = zip(before, config.widths, config.attends, strict=False)
        last = config.widths[-1]
        self.conv_in = nn.Conv2d(config.channels, config.first, 3, padding=1)
        self.down = nn.ModuleList(
            [
                _Level(inputs, outputs, config.blocks, attends, i < len(config.widths) - 1)
                for i, (inputs, outputs, attends) in enumerate(levels)
            ]
        )
        self.mid = _Middle(last, config.attends_last)
        self.norm_out = nn.GroupNorm(GROUPS, last, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(last, config.latent, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(pixel_values)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(nn.functional.silu(self.norm_out(self.mid(hidden))))


class _Level(nn.Module):
    """Blocks at one resolution [N, inputs, R, R] → [N, outputs, R, R], or R/2 where another follows."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attends: bool, halves: bool):
        super().__init__()
        self.block = nn.ModuleList([VqBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)])
        self.attn = nn.ModuleList([_Attention(outputs) for _ in range(blocks)] if attends else [])
        self.downsample = nn.ModuleDict({"conv": nn.Conv2d(outputs, outputs, 3, stride=2)}) if halves else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            hidden = block(hidden)
            hidden = self.attn[i](hidden) if len(self.attn) else hidden
        if self.downsample is None:
            return hidden
        return halved(self.downsample["conv"], hidden)


def halved(conv: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[N, D, R, C] → [N, D, R/2, C/2], by a convolution of 3 × 3 that is filled up at the bottom and right alone."""
    return conv(nn.functional.pad(hidden, (0, 1, 0, 1)))


class _Middle(nn.Module):
    def __init__(self, width: int, attends: bool):
        super().__init__()
        self.block_1, self.block_2 = VqBlock(width, width), VqBlock(width, width)
        self.attn_1 = _Attention(width) if attends else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class VqBlock(nn.Module):
    """[N, inputs, R, R] → [N, outputs, R, R], added to what comes in, whose width is changed if it must."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, width, eps=NORM_EPS) for width in (inputs, outputs))
        self.conv1, self.conv2 = (nn.Conv2d(width, outputs, 3, padding=1) for width in (inputs, outputs))
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        hidden = self.conv2(nn.functional.silu(self.norm2(hidden)))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Attention(nn.Module):
    """[N, D, R, R] → the same: every place sees every other, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = (part(normed).flatten(2) for part in (self.q, self.k, self.v))
        scores = torch.softmax(query.transpose(1, 2) @ key * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((value @ scores.transpose(1, 2)).reshape(x.shape))


class Codebook(nn.Module):
    """vision_hidden [N, latent, rows, columns] → image_features [N, rows · columns, outputs]: the row of `table` that
    belongs to the nearest of `codes` codes of `size` elements."""

    def __init__(self, latent: int, size: int, codes: int, outputs: int):
        super().__init__()
        self.quant_conv = nn.Conv2d(latent, size, 1)
        self.codes = nn.Parameter(torch.empty(size, codes))
        self.lengths = nn.Parameter(torch.empty(codes))
        self.table = nn.Parameter(torch.empty(codes, outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        places = self.quant_conv(hidden).flatten(2).transpose(1, 2)
        scores = self._scores(places, 0)
        chosen = scores.argmax(-1)
        for start in range(_TOGETHER, self.codes.shape[1], _TOGETHER):
            highest, others = scores.amax(-1), self._scores(places, start)
            chosen = torch.where(others.amax(-1) > highest, others.argmax(-1) + start, chosen)
            scores = torch.maximum(highest, others.amax(-1)).unsqueeze(-1)
        return nn.functional.embedding(chosen, self.table)

    def _scores(self, places: torch.Tensor, start: int) -> torch.Tensor:
        """How near places [N, S, size] are to some codes [N, S, ≤ _TOGETHER]: −|z − e|² without |z|², halved."""
        if self.codes.shape[1] <= _TOGETHER:
            return places @ self.codes - self.lengths
        some = slice(start, start + _TOGETHER)
        return places @ self.codes[:, some] - self.lengths[some]


def codebook_derived(
    weights: Weights, name: str, size: int, embedding: str, words: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """The parameters of a Codebook that are not tensors of a checkpoint: of its codes, stored as `name`, and of the
    `words` [codes] that they are, whose rows stand in the tensor `embedding`."""
    stored, rows = weights.use(name, (len(words), size)), weights.use(embedding, weights.shape(embedding))
    return {
        "codes": lambda: np.ascontiguousarray(stored().T),
        "lengths": lambda: np.square(stored()).sum(1) / 2,
        "table": lambda: rows()[words],
    }
