"""The tower of BLIP-2 and its successors: EVA's, with a class token and one matrix for queries, keys and values.

Parameter names follow transformers, so that weights stream in by name.
"""

import torch
from torch import nn

from mllm_edge.export.vision.clip import ClassTokenEmbeddings
from mllm_edge.export.vision.modules import Linear, Mlp, packed_attention
from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["BlipTower"]


class BlipTower(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, 1 + patches², hidden_size].

    `embeddings.positions` [1 + patches², D] holds the class token in its first row, added to that row's position.
    """

    def __init__(self, config: SiglipConfig, qkv_bias: bool):
        super().__init__()
        self.embeddings = ClassTokenEmbeddings(config, bias=True)
        layers = nn.ModuleList([_Layer(config, qkv_bias) for _ in range(config.layers)])
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


class _Layer(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D]."""

    def __init__(self, config: SiglipConfig, qkv_bias: bool):
        super().__init__()
        size = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(size, eps=config.norm_eps) for _ in range(2))
        self.self_attn = _Attention(size, config.heads, qkv_bias)
        self.mlp = Mlp(size, config.intermediate_size, config.activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = Linear(size, 3 * size, bias), Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(packed_attention(self.qkv(x), self.heads))
