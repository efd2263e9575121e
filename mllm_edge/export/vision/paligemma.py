"""PaliGemma's projector: one linear layer. Parameter names follow the checkpoint."""

import torch
from torch import nn

from mllm_edge.export.vision.modules import Linear

__all__ = ["Projector"]


class Projector(nn.Module):
    """vision_hidden [N, S, inputs] → image_features [N, S, outputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = Linear(inputs, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)
