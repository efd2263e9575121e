"""FastViT-HD in plain torch, from the architecture's definition, with timm's names of parameters. `test_timm.py`
compares it with timm's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FastVit"]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.ModuleDict({"reparam_conv": nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)})


def through(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block["reparam_conv"](x)


def scale(width: int) -> nn.Module:
    return nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width, 1, 1))})


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        spatial = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.conv = nn.Sequential()
        self.conv.add_module("conv", spatial)
        self.conv.add_module("bn", nn.BatchNorm2d(width))
        self.fc1, self.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(self.conv(x))))


class Mixing(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_mixer, self.mlp, self.layer_scale = conv(width, width, 3, 1, width), Mlp(width), scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = through(self.token_mixer, x)
        return x + self.layer_scale["gamma"] * self.mlp(x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, width, rows, cols = x.shape
        qkv = self.qkv(x.permute(0, 2, 3, 1)).reshape(n, rows * cols, 3, width // 32, 32)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(2, 3) / 32**0.5, dim=-1)
        seen = self.proj((weights @ value).transpose(1, 2).flatten(2))
        return seen.transpose(1, 2).unflatten(2, (rows, cols))


class Looking(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.token_mixer, self.mlp = nn.LayerNorm(width), Attention(width), Mlp(width)
        self.layer_scale_1, self.layer_scale_2 = scale(width), scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        x = x + self.layer_scale_1["gamma"] * self.token_mixer(normed)
        return x + self.layer_scale_2["gamma"] * self.mlp(x)


class FastVit(nn.Module):
    def __init__(
        self, layers: Sequence[int] = (2, 12, 24, 4, 2), embed_dims: Sequence[int] = (96, 192, 384, 768, 1536)
    ):
        super().__init__()
        widths = embed_dims
        first, last, outer = widths[0], widths[-1], 2 * widths[-1]
        self.stem = nn.ModuleList([conv(3, first, 3, 2), conv(first, first, 3, 2, first), conv(first, first, 1)])
        self.stages = nn.ModuleList()
        for i, (count, width) in enumerate(zip(layers, widths, strict=True)):
            stage = nn.ModuleDict()
            if i:
                before = widths[i - 1]
                halves = nn.ModuleList([conv(before, width, 7, 2, before), conv(width, width, 1)])
                stage["downsample"] = nn.ModuleDict({"proj": halves})
            if i >= 3:
                stage["pos_emb"] = conv(width, width, 7, 1, width)
            stage["blocks"] = nn.Sequential(*((Looking if i >= 3 else Mixing)(width) for _ in range(count)))
            self.stages.append(stage)
        self.final_conv = conv(last, outer, 3, 1, last)
        inner = max(1, int(outer / 16 + 0.5))
        self.final_conv["se"] = nn.ModuleDict({"fc1": nn.Conv2d(outer, inner, 1), "fc2": nn.Conv2d(inner, outer, 1)})

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, side, side] → [N, 2 · widths[-1], side / 64, side / 64]"""
        for block in self.stem:
            x = functional.gelu(through(block, x))
        for stage in self.stages:
            for block in stage["downsample"]["proj"] if "downsample" in stage else ():
                x = functional.gelu(through(block, x))
            x = stage["blocks"](through(stage["pos_emb"], x) if "pos_emb" in stage else x)
        x, gates = through(self.final_conv, x), self.final_conv["se"]
        gate = gates["fc2"](functional.relu(gates["fc1"](functional.adaptive_avg_pool2d(x, 1))))
        return functional.gelu(x * torch.sigmoid(gate))

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of all patches, which nobody looks at: [N, C]."""
        return x.mean((2, 3))
