"""The Perception Encoder in plain torch, from the architecture's definition, with timm's names of parameters.
`test_timm.py` compares it with timm's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["ARCHITECTURES", "PerceptionEncoder"]

# Layers, width, width within a layer for one of it, whether there is a class token.
ARCHITECTURES = {
    "vit_pe_core_large_patch14_336": (24, 1024, 4.0, True),
    "vit_pe_core_gigantic_patch14_448": (50, 1536, 8960 / 1536, False),
}
HEADS, PATCH = 16, 14


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        each = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = turned(each[0], angles), turned(each[1], angles), each[2]
        return self.proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbours of x [N, heads, S, D] as a complex number, turned by angles [S, D/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), angles)
        return x + self.gamma_2 * self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class PerceptionEncoder(nn.Module):
    def __init__(
        self,
        name: str,
        global_pool: str,
        init_values: float,
        img_size: Sequence[int],
        ref_feat_shape: Sequence[int],
        embed_dim: int | None = None,
        depth: int | None = None,
        use_post_transformer_norm: bool = True,
    ):
        super().__init__()
        assert global_pool == ""
        assert init_values is not None
        layers, width, wider, self.token = ARCHITECTURES[name]
        layers, width = depth or layers, embed_dim or width
        self.side, self.reference = img_size[0] // PATCH, ref_feat_shape[0]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH, bias=False)})
        if self.token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + self.token, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, int(width * wider)) for _ in range(layers)])
        self.norm: Any = nn.LayerNorm(width) if use_post_transformer_norm else nn.Identity()

    def angles(self) -> torch.Tensor:
        """[S, D/2]: by the column, then by the row, from 1 on behind a class token."""
        width = self.pos_embed.shape[-1] // HEADS // 4
        bands = 10000.0 ** -(torch.arange(width) / width)
        places = (torch.arange(self.side) + int(self.token)) * self.reference / self.side
        cols, rows = places.repeat(self.side), places.repeat_interleave(self.side)
        found = torch.cat([cols[:, None] * bands, rows[:, None] * bands], 1)
        return functional.pad(found, (0, 0, int(self.token), 0))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, side, side] → [N, patches, D], a class token before them where there is one"""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        if self.token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x, angles = self.norm_pre(x + self.pos_embed), self.angles()
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """What nobody looks at."""
        return x
