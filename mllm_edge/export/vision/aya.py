"""The connector of Aya Vision.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

import torch
from torch import nn

from mllm_edge.export.vision.modules import Linear, pixel_shuffle

__all__ = ["GatedConnector"]


class GatedConnector(nn.Module):
    """vision_hidden [N, p², D] → image_features [N, p²/s², outputs]: s×s neighbouring patches through a norm, and a
    gated MLP of which half of `inner` is the gate."""

    def __init__(self, patches: int, scale: int, size: int, inner: int, outputs: int, norm_eps: float):
        super().__init__()
        self.patches, self.scale, self.gated = patches, scale, inner // 2
        self.layernorm = nn.LayerNorm(size * scale**2, eps=norm_eps)
        self.linear_1, self.linear_2 = Linear(size * scale**2, inner), Linear(inner // 2, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        both = self.linear_1(self.layernorm(pixel_shuffle(hidden, self.patches, self.scale)))
        values, gate = both[..., : self.gated], both[..., self.gated :]
        return self.linear_2(nn.functional.silu(gate) * values)
