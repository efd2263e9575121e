"""The tower of Qwen2.5-VL: Qwen2-VL's cells of patches, most layers of which look only at windows of the image.

Parameter names follow the checkpoint, so that weights stream in by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, GatedMlp, Linear, RmsNorm
from mllm_edge.export.vision.qwen_vl import PatchMerger, QwenVlAttention, QwenVlConfig

__all__ = ["Qwen25VlConfig", "Qwen25VlTower", "qwen25_merger"]

_NORM_EPS = 1e-6  # fixed in the reference


@dataclass(frozen=True)
class Qwen25VlConfig:
    """Sizes of the tower. `full` are the layers, from 0, that see the whole image; the others see windows of `side` ×
    `side` cells."""

    sizes: QwenVlConfig
    full: tuple[int, ...]
    side: int

    @classmethod
    def read(cls, vision: ConfigReader) -> "Qwen25VlConfig":
        """A tower's settings; raises ConfigError."""
        hidden, heads = vision.heads("hidden_size", "num_heads", multiple=4)
        patch, merge, frames = map(vision.positive, ("patch_size", "spatial_merge_size", "temporal_patch_size"))
        window, full = vision.positive("window_size"), vision.take("fullatt_block_indexes")
        if window < patch * merge:
            raise ConfigError(
                f"vision_config: window_size {window} is smaller than {merge} patches of {patch} px", OWN_CONFIG
            )
        sizes = QwenVlConfig(
            hidden_size=hidden,
            intermediate_size=vision.positive("intermediate_size"),
            layers=vision.positive("depth"),
            heads=heads,
            patch_values=vision.require("in_channels", 3) * frames * patch**2,
            merge=merge,
            norm_eps=_NORM_EPS,
            activation=vision.require("hidden_act", *ACTIVATIONS),
        )
        return cls(sizes, tuple(full), window // merge // patch)


class Qwen25VlTower(nn.Module):
    """One image: pixel_values [cells, merge², patch_values], cos and sin [cells, merge², D/(2·heads)], float32, and its
    windows of W = side² · merge² patches: window_index [windows, side²] int64, window_bias [windows, 1, W, W] float32,
    cell_index [cells] int64 → vision_hidden [cells, merge², D], the cells in their own order.

    Between layers that see the whole image, hidden states stay in windows, padded where the image ends.
    """

    def __init__(self, config: Qwen25VlConfig):
        super().__init__()
        self.config, sizes = config, config.sizes
        self.patch_embed = nn.ModuleDict({"proj": Linear(sizes.patch_values, sizes.hidden_size, bias=False)})
        self.blocks = nn.ModuleList([_Block(sizes) for _ in range(sizes.layers)])

    def forward(
        self,
        pixel_values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        window_index: torch.Tensor,
        window_bias: torch.Tensor,
        cell_index: torch.Tensor,
    ) -> torch.Tensor:
        hidden = self.patch_embed["proj"](pixel_values)
        image = tuple(_turns(table.flatten(0, 1)) for table in (cos, sin))
        windows = tuple(_turns(_windowed(table, window_index)) for table in (cos, sin))
        in_windows = False
        for layer, block in enumerate(self.blocks):
            full = layer in self.config.full
            if full and in_windows:
                hidden = self._cells(hidden, cell_index)
            elif not full and not in_windows:
                hidden = _windowed(hidden, window_index)
            in_windows = not full
            if full:
                seen = block(hidden.flatten(0, 1).unsqueeze(0), *image)
                hidden = seen.reshape(-1, self.config.sizes.merge**2, seen.shape[-1])
            else:
                hidden = block(hidden, *windows, window_bias)
        return self._cells(hidden, cell_index) if in_windows else hidden

    def _cells(self, windows: torch.Tensor, cell_index: torch.Tensor) -> torch.Tensor:
        """[windows, W, D] → [cells, merge², D]."""
        return windows.unflatten(1, (self.config.side**2, -1)).flatten(0, 1).index_select(0, cell_index)


def _windowed(cells: torch.Tensor, window_index: torch.Tensor) -> torch.Tensor:
    """[cells, merge², D] → [windows, W, D]."""
    # Selected, not indexed: indexing is traced to operators that half precision does not have everywhere.
    chosen = cells.index_select(0, window_index.flatten())
    return chosen.reshape(window_index.shape[0], -1, chosen.shape[-1])


def _turns(table: torch.Tensor) -> torch.Tensor:
    """cos or sin with an axis for query and key, and one for heads: [.., half] → [.., 1, 1, half]."""
    return table.unsqueeze(-2).unsqueeze(-2)


class _Block(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D]."""

    def __init__(self, config: QwenVlConfig):
        super().__init__()
        self.norm1 = RmsNorm(config.hidden_size, config.norm_eps)
        self.attn = QwenVlAttention(config)
        self.norm2 = RmsNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, config.activation)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin, bias)
        return hidden + self.mlp(self.norm2(hidden))


def qwen25_merger(config: Qwen25VlConfig, text_hidden: int) -> PatchMerger:
    """vision_hidden [cells, merge², D] → image_features [cells, text_hidden]."""
    return PatchMerger(config.sizes, text_hidden, RmsNorm)
