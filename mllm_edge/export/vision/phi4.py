"""The tower of Phi-4 multimodal: SigLIP over tiles that an image may fill in part. Patches have the learned positions
of the part that it fills, and look at that part alone.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

import torch
from torch import nn

from mllm_edge.export.vision.siglip import SiglipConfig, SiglipLayer

__all__ = ["Phi4Tower"]


class Phi4Tower(nn.Module):
    """pixel_values [N, C, tile, tile] float32, patch_places [N, patches²] int64 and patch_bias [N, 1, 1, patches²]
    float32 → vision_hidden [N, patches², D]: the hidden states behind `config.layers` layers."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        patches = nn.Conv2d(config.channels, config.hidden_size, config.patch, config.patch)
        positions = nn.Embedding(config.grid**2, config.hidden_size)
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": positions})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])})

    def forward(self, pixel_values: torch.Tensor, patch_places: torch.Tensor, patch_bias: torch.Tensor) -> torch.Tensor:
        patches, width = self.config.patches**2, self.config.hidden_size
        learned = self.embeddings["position_embedding"].get_parameter("weight")
        hidden = self.embeddings["patch_embedding"](pixel_values).flatten(2).transpose(1, 2)
        hidden = hidden + learned.index_select(0, patch_places.flatten()).reshape(-1, patches, width)
        # A row for each patch that looks: not every runtime repeats a bias over them.
        bias = patch_bias + patch_bias.new_zeros((1, 1, patches, 1))
        for layer in self.encoder["layers"].children():
            hidden = layer(hidden, bias)
        return hidden
