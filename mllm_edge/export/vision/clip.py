"""CLIP tower with a class token, and LLaVA's two-layer connector.

Parameter names follow the checkpoint (`pre_layrnorm` is CLIP's own spelling), so that weights stream in by name.
"""

import math

import torch
from torch import nn

from mllm_edge.export.vision.modules import Linear, activate
from mllm_edge.export.vision.siglip import SiglipConfig, SiglipLayer, Taps, run_layers

__all__ = ["ClassTokenEmbeddings", "ClipFeatures", "MlpConnector"]


class ClipFeatures(nn.Module):
    """pixel_values [N, C, tile, tile] float32 → vision_hidden [N, 1 + patches² − skipped, D · taps].

    `config.layers` counts the layers that the taps need. `embeddings.positions` [1 + patches², D] holds the class
    token in its first row, added to that row's position.
    """

    def __init__(self, config: SiglipConfig, taps: Taps):
        super().__init__()
        self.taps = taps
        self.embeddings = ClassTokenEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        return run_layers(hidden, self.encoder["layers"], self.taps)


class ClassTokenEmbeddings(nn.Module):
    """pixel_values [N, C, tile, tile] → [N, 1 + patches², D]; `positions` as of `ClipFeatures`, `bias`: of patches."""

    def __init__(self, config: SiglipConfig, bias: bool = False):
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch, bias=bias)
        self.positions = nn.Parameter(torch.empty(1 + config.patches**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        # A row of zeros for the class token: a constant pad, where expanding a parameter needs the batch size.
        return nn.functional.pad(patches, (0, 0, 1, 0)) + self.positions


class MlpConnector(nn.Module):
    """vision_hidden [N, S, inputs] → image_features [N, S / pool², outputs]: linear, activation, linear. Before them a
    norm, where `norm_eps` is told, and the mean of each pool × pool neighbours of a square of features; `late`: the
    mean of what the second layer gets, and so of what it makes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str,
        bias: bool,
        norm_eps: float | None = None,
        pool: int = 1,
        late: bool = False,
    ):
        super().__init__()
        self.activation, self.pool, self.late = activation, pool, late
        self.projector_layernorm = None if norm_eps is None else nn.LayerNorm(inputs, eps=norm_eps)
        self.linear_1 = Linear(inputs, outputs, bias)
        self.linear_2 = Linear(outputs, outputs, bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.projector_layernorm is not None:
            hidden = self.projector_layernorm(hidden)
        if self.pool > 1 and not self.late:
            hidden = _pooled(hidden, self.pool)
        hidden = activate(self.activation, self.linear_1(hidden))
        return self.linear_2(_pooled(hidden, self.pool) if self.pool > 1 and self.late else hidden)


def _pooled(hidden: torch.Tensor, pool: int) -> torch.Tensor:
    """hidden [N, p², D] → [N, p² / pool², D], row by row."""
    side, width = math.isqrt(hidden.shape[1]) // pool, hidden.shape[-1]
    # As sums of slices: ONNX Runtime has no AveragePool for CUDA, and TensorRT no ReduceMean of axes as it is traced.
    rows = _summed(hidden.reshape(-1, side, pool * side * pool * width), pool)
    return _summed(rows.reshape(-1, side * side, pool * width), pool) / pool**2


def _summed(x: torch.Tensor, parts: int) -> torch.Tensor:
    """x [..., parts · size] → [..., size], the sum of the parts."""
    size = x.shape[-1] // parts
    first, *others = (x[..., i * size : (i + 1) * size] for i in range(parts))
    return sum(others, first)
