"""Gemma 3's connector: the mean of neighbouring patches, a norm, a projection."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import Linear, RmsNorm

__all__ = ["PoolingConnector", "pooling_derived"]


class PoolingConnector(nn.Module):
    """vision_hidden [N, patches², inputs] → image_features [N, side², outputs]."""

    def __init__(self, patches: int, side: int, inputs: int, outputs: int, eps: float):
        super().__init__()
        self.pooled, self.side = patches // side, side
        self.shares = nn.Parameter(torch.empty(1, self.pooled**2))
        self.mm_soft_emb_norm = RmsNorm(inputs, eps)
        self.projection = Linear(inputs, outputs, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        width = hidden.shape[-1]
        cells = hidden.reshape(-1, self.side, self.pooled, self.side, self.pooled, width).transpose(2, 3)
        # A product: a mean over axes is traced with these reshaped, which TensorRT's parser does not take for constant.
        tokens = (self.shares @ cells.reshape(-1, self.side**2, self.pooled**2, width)).squeeze(2)
        return self.projection(self.mm_soft_emb_norm(tokens))


def pooling_derived(
    weights: Weights, prefix: str, pooled: int, inputs: int, outputs: int
) -> dict[str, Callable[[], np.ndarray]]:
    """The connector's parameters, which a checkpoint has in another form: a scale less 1, a transposed matrix; and the
    shares of the `pooled`² patches in a token."""
    scale = weights.use(f"{prefix}mm_soft_emb_norm.weight", (inputs,))
    projection = weights.use(f"{prefix}mm_input_projection_weight", (inputs, outputs))
    return {
        "shares": lambda: np.full((1, pooled**2), pooled**-2, np.float32),
        "mm_soft_emb_norm.weight": lambda: scale() + 1,
        "projection.weight": lambda: np.ascontiguousarray(projection().T),
    }
