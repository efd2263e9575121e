"""The aligners of DeepSeek-VL and Janus, and the two towers of its hybrid.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import Linear, activate
from mllm_edge.export.vision.sam import SamConfig, SamEncoder, SamNeck, sam_derived
from mllm_edge.export.vision.siglip import SiglipConfig, SiglipTower

__all__ = ["Aligner", "DeepAligner", "HybridAligner", "HybridTowers", "hybrid_derived"]

_SAM = "high_res_vision_model.vision_encoder."


class Aligner(nn.Module):
    """vision_hidden [N, S, inputs] → image_features [N, S, outputs]: linear, GELU, linear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear1, self.linear2 = Linear(inputs, outputs), Linear(outputs, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear2(nn.functional.gelu(self.linear1(hidden)))


class DeepAligner(nn.Module):
    """vision_hidden [N, S, inputs] → image_features [N, S, outputs]: `depth` linear layers with activations between."""

    def __init__(self, inputs: int, outputs: int, depth: int, activation: str):
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(inputs, outputs)
        self.hidden_layers = nn.ModuleList([Linear(outputs, outputs) for _ in range(1, depth)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(hidden)
        for layer in self.hidden_layers:
            hidden = layer(activate(self.activation, hidden))
        return hidden


class HybridAligner(nn.Module):
    """vision_hidden [N, S, inputs] and high_res_hidden [N, S, high] → image_features [N, S, outputs]: each makes half
    of the channels, the high resolution the first."""

    def __init__(self, inputs: int, high: int, outputs: int):
        super().__init__()
        self.vision_proj, self.high_res_vision_proj = Linear(inputs, outputs // 2), Linear(high, outputs // 2)
        self.proj = Linear(outputs, outputs)

    def forward(self, hidden: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.high_res_vision_proj(high), self.vision_proj(hidden)], dim=-1)
        return self.proj(nn.functional.gelu(joined))


class HybridTowers(nn.Module):
    """pixel_values [1, C, tile, tile] and high_res_pixel_values [1, C, large, large] → vision_hidden [1, patches², D]
    and high_res_hidden [1, patches², 4 · outputs].

    The latter is Segment Anything's output, and that of the first layer of it that looks at the whole image, brought to
    as many features as SigLIP has patches.
    """

    def __init__(self, tower: SiglipConfig, sam: SamConfig):
        super().__init__()
        self.vision_model = SiglipTower(tower)
        self.high_res_vision_model = nn.ModuleDict({"vision_encoder": SamEncoder(sam, sam.whole[0])})
        self.high_res_vision_neck = SamNeck(sam)
        self.high_res_vision_proj = _Quarter(sam.outputs, sam.patches, tower.patches)
        self.high_res_vision_alpha = nn.Parameter(torch.empty(1))

    def forward(
        self, pixel_values: torch.Tensor, high_res_pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        last, inner = self.high_res_vision_model["vision_encoder"](high_res_pixel_values)
        # The reference brings both to their size and adds them: all that it does there is linear.
        both = last + self.high_res_vision_neck(inner) * self.high_res_vision_alpha
        return self.vision_model(pixel_values), self.high_res_vision_proj(both).flatten(2).transpose(1, 2)


class _Quarter(nn.Module):
    """[1, C, before, before] → [1, 4 · C, side, side]: bilinearly to four times the side, then halved twice."""

    def __init__(self, channels: int, before: int, side: int):
        super().__init__()
        self.shares = nn.Parameter(torch.empty(before, 4 * side))
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        wide = features @ self.shares
        return self.conv2(self.conv1((wide.transpose(2, 3) @ self.shares).transpose(2, 3)))


def hybrid_derived(
    tower: SiglipConfig, sam: SamConfig, weights: Weights, prefix: str
) -> dict[str, Callable[[], np.ndarray]]:
    """The towers' parameters that are not tensors of a checkpoint, by name; `prefix` is theirs there."""

    def shares() -> np.ndarray:
        rows = torch.eye(sam.patches)[None]
        return nn.functional.interpolate(rows, size=4 * tower.patches, mode="linear")[0].numpy()

    embeddings, size = "vision_model.embeddings.", (tower.grid**2, tower.hidden_size)
    return {
        f"{embeddings}positions": weights.use(f"{prefix}{embeddings}position_embedding.weight", size),
        "high_res_vision_proj.shares": shares,
        **{_SAM + name: read for name, read in sam_derived(sam, weights, prefix + _SAM).items()},
    }
