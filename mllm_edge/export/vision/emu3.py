"""The encoder of Emu3's VQ-VAE, which was made for video, for one image: four equal frames.

In time it has convolutions that see no later frame, and zeros before the first. Of four equal frames they make two and
then one, so that each is a convolution of the image alone, whose kernel is a sum over the frames that it sees.

Parameter names follow transformers, so that weights stream in by name; `emu3_derived` makes the others.
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
from mllm_edge.export.vision.modules import Linear, packed_attention, packed_linear
from mllm_edge.export.vision.vqgan import GROUPS, NORM_EPS, VqBlock, halved

__all__ = ["Emu3Config", "Emu3Encoder", "emu3_derived", "quantizer_derived"]

_FRAMES, _TIME_EPS = 4, 1e-5  # that an image is; the batch norms' eps, fixed in the reference
Reader = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Emu3Config:
    """Sizes of the encoder. `widths` are the channels at each resolution, each the half of the one before; `attends`:
    at which of them attention stands behind each block. `codes` of `code_size` elements."""

    channels: int
    widths: tuple[int, ...]
    first: int
    blocks: int
    latent: int
    heads: int
    code_size: int
    codes: int
    attends: tuple[bool, ...]

    @classmethod
    def read(cls, vision: ConfigReader) -> "Emu3Config":
        """An encoder's settings; raises ConfigError."""
        first, factors = vision.positive("base_channels"), list(vision.take("channel_multiplier"))
        widths, attending = tuple(first * factor for factor in factors), vision.take("attn_resolutions") or []
        attends = tuple(level in attending for level in range(len(widths)))
        size, heads = vision.heads()
        vision.require("double_latent", False)
        vision.require("temporal_downsample_factor", _FRAMES)
        vision.take("out_channels")  # of what paints
        differing = [width for width, attends in zip(widths, attends, strict=True) if attends and width != size]
        if not widths or any(width % GROUPS for width in (first, *widths)) or widths[-1] != size or differing:
            raise ConfigError(
                f"vq_config: base_channels {first} times channel_multiplier {factors} in {GROUPS} groups, hidden_size "
                f"{size} where attention stands: at attn_resolutions {attending} and the last",
                OWN_CONFIG,
            )
        return cls(
            channels=vision.require("in_channels", 3),
            widths=widths,
            first=first,
            blocks=vision.positive("num_res_blocks"),
            latent=vision.positive("latent_channels"),
            heads=heads,
            code_size=vision.positive("embed_dim"),
            codes=vision.positive("codebook_size"),
            attends=attends,
        )

    @property
    def cell(self) -> int:
        """The side in px of what becomes one code."""
        return int(2 ** (len(self.widths) - 1))


class Emu3Encoder(nn.Module):
    """pixel_values [1, C, height, width] → vision_hidden [1, latent, height / cell, width / cell]."""

    def __init__(self, config: Emu3Config):
        super().__init__()
        before, last, latent = (config.first, *config.widths), config.widths[-1], config.latent
        ends = len(config.widths) - 1
        levels = [
            _Level(before[i], width, config, config.attends[i], halves=i < ends)
            for i, width in enumerate(config.widths)
        ]
        self.conv_in = nn.Conv2d(config.channels, config.first, 3, padding=1)
        self.down_block = nn.ModuleDict({"down": nn.ModuleList(levels)})
        self.middle_block = _Middle(last, config.heads)
        self.norm_out = nn.GroupNorm(GROUPS, last, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(last, latent, 3, padding=1)
        # To two frames, side by side as channels, and to one.
        sizes = ((latent, 2 * latent), (2 * latent, latent))
        self.time_conv = nn.ModuleList([nn.Conv2d(*size, 3, padding=1) for size in sizes])
        self.time_res_stack = nn.ModuleList([_TimeBlock(latent) for _ in range(config.blocks)])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(pixel_values)
        for level in self.down_block["down"].children():
            hidden = level(hidden)
        hidden = self.conv_out(nn.functional.silu(self.norm_out(self.middle_block(hidden))))
        for conv in self.time_conv:
            hidden = nn.functional.silu(conv(hidden))
        for block in self.time_res_stack:
            hidden = block(hidden)
        return hidden


class _Level(nn.Module):
    """Blocks at one resolution [1, inputs, R, C] → [1, outputs, R, C], or R/2 and C/2 where another follows."""

    def __init__(self, inputs: int, outputs: int, config: Emu3Config, attends: bool, halves: bool):
        super().__init__()
        count = config.blocks if attends else 0
        self.block = nn.ModuleList([VqBlock(inputs if i == 0 else outputs, outputs) for i in range(config.blocks)])
        self.attn = nn.ModuleList([_Attention(outputs, config.heads) for _ in range(count)])
        self.attn_norms = nn.ModuleList([nn.GroupNorm(GROUPS, outputs, eps=NORM_EPS) for _ in range(count)])
        self.downsample = nn.ModuleDict({"conv": nn.Conv2d(outputs, outputs, 3, stride=2)}) if halves else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = hidden + self.attn[i](self.attn_norms[i](hidden))
        return hidden if self.downsample is None else halved(self.downsample["conv"], hidden)


class _Middle(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.block_1, self.block_2 = VqBlock(width, width), VqBlock(width, width)
        self.attn_1, self.attn_norm = _Attention(width, heads), nn.GroupNorm(GROUPS, width, eps=NORM_EPS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.block_1(hidden)
        return self.block_2(hidden + self.attn_1(self.attn_norm(hidden)))


class _Attention(nn.Module):
    """[1, D, R, C] → the same: every place sees every other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = packed_linear(x.flatten(2).transpose(1, 2), [self.q_proj, self.k_proj, self.v_proj])
        return self.out_proj(packed_attention(qkv, self.heads)).transpose(1, 2).reshape(x.shape)


class _TimeBlock(nn.Module):
    """[1, latent, R, C] → the same, added to what comes in; the norms are scales and shifts of channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = _Scale(width), _Scale(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(hidden)))


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.empty(width, 1, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


def emu3_derived(config: Emu3Config, weights: Weights, prefix: str) -> dict[str, Reader]:
    """The encoder's parameters that are not tensors of a checkpoint: what is in time."""
    size, found = config.latent, dict[str, Reader]()

    def read(name: str, *shape: int) -> Reader:
        return weights.use(prefix + name, shape)

    # Of zeros and the frames a, a, a, a the first sees two and two; of zeros, a and b the next one sees all.
    for i, fold in enumerate((_two_of_four, _one_of_two)):
        kernel, bias = read(f"time_conv.{i}.conv.conv.weight", size, size, 4, 3, 3), f"time_conv.{i}.conv.conv.bias"
        found[f"time_conv.{i}.weight"] = partial(fold, kernel)
        found[f"time_conv.{i}.bias"] = partial(_repeated, read(bias, size), 2 if i == 0 else 1)
    for i in range(config.blocks):
        for k in (1, 2):
            conv, norm = f"time_res_stack.{i}.conv{k}", f"time_res_stack.{i}.norm{k}"
            found[f"{conv}.weight"] = partial(_latest, read(f"{conv}.conv.weight", size, size, 3, 3, 3))
            found[f"{conv}.bias"] = read(f"{conv}.conv.bias", size)
            parts = [read(f"{norm}.{part}", size) for part in ("weight", "bias", "running_mean", "running_var")]
            found[f"{norm}.scale"], found[f"{norm}.shift"] = partial(_scale, *parts), partial(_shift, *parts)
    return found


def quantizer_derived(config: Emu3Config, weights: Weights, prefix: str) -> dict[str, Reader]:
    """What leads from the encoder to the codes: a convolution in time, too."""
    kernel = weights.use(f"{prefix}quant_conv.conv.weight", (config.code_size, config.latent, 3, 1, 1))
    bias = weights.use(f"{prefix}quant_conv.conv.bias", (config.code_size,))
    return {"quant_conv.weight": partial(_latest, kernel), "quant_conv.bias": bias}


def _two_of_four(kernel: Reader) -> np.ndarray:
    """[out, in, 4, 3, 3] → [2 · out, in, 3, 3]: for a frame behind zeros, and for one behind its like."""
    stored = kernel()
    return np.concatenate([stored[:, :, 2:].sum(2), stored.sum(2)])


def _one_of_two(kernel: Reader) -> np.ndarray:
    """[out, in, 4, 3, 3] → [out, 2 · in, 3, 3]: for two frames side by side, behind zeros."""
    stored = kernel()
    return np.concatenate([stored[:, :, 2], stored[:, :, 3]], axis=1)


def _latest(kernel: Reader) -> np.ndarray:
    """[out, in, 3, R, C] → [out, in, R, C]: for one frame behind zeros."""
    return np.ascontiguousarray(kernel()[:, :, 2])


def _repeated(bias: Reader, times: int) -> np.ndarray:
    return np.tile(bias(), times)


def _scale(weight: Reader, _: Reader, __: Reader, variance: Reader) -> np.ndarray:
    return (weight() / np.sqrt(variance() + _TIME_EPS)).reshape(-1, 1, 1)


def _shift(weight: Reader, bias: Reader, mean: Reader, variance: Reader) -> np.ndarray:
    return bias().reshape(-1, 1, 1) - mean().reshape(-1, 1, 1) * _scale(weight, bias, mean, variance)
