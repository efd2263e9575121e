"""What makes tokens of Segment Anything's features for GOT-OCR 2.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

import torch
from torch import nn

from mllm_edge.export.vision.modules import Linear

__all__ = ["Projector", "halved"]


def halved(side: int) -> int:
    """The side of a square of features behind the projector's two convolutions."""
    return -(-side // 4)


class Projector(nn.Module):
    """vision_hidden [1, inputs, rows, columns] → image_features [1, rows/4 · columns/4, outputs]: halved twice."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv_upsampler1 = nn.Conv2d(inputs, 2 * inputs, 3, stride=2, padding=1, bias=False)
        self.conv_upsampler2 = nn.Conv2d(2 * inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.multimodal_projector = Linear(outputs, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        features = self.conv_upsampler2(self.conv_upsampler1(hidden))
        return self.multimodal_projector(features.flatten(2).transpose(1, 2))
