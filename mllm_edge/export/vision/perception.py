"""The Perception Encoder, the tower of PerceptionLM: square tiles of patches, turned by their places in the tile, and
branches that are scaled per channel.

Parameter names follow timm; `perception_derived` makes those that no checkpoint has so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import Mlp
from mllm_edge.export.vision.qwen_vl import QwenVlAttention, QwenVlConfig

__all__ = ["PerceptionConfig", "PerceptionEncoder", "perception_derived"]

# Whether a class token stands before the patches; values within a layer for each that goes through it.
_ARCHITECTURES = {
    "vit_pe_core_large_patch14_336": (True, 4.0),
    "vit_pe_core_gigantic_patch14_448": (False, 8960 / 1536),
}
# Fixed in these architectures.
_PATCH, _HEADS, _CHANNELS = 14, 16, 3
_EPS, _THETA = 1e-5, 10000.0


@dataclass(frozen=True)
class PerceptionConfig:
    """Sizes of the tower. `tile` is the side in px of the images that it sees; patches are turned as those of a tile of
    `reference` × `reference` ones; `token`: whether a class token stands before them, `final_norm`: whether a norm
    follows the layers."""

    sizes: QwenVlConfig
    tile: int
    reference: int
    token: bool
    final_norm: bool

    @classmethod
    def read(cls, vision: ConfigReader) -> "PerceptionConfig":
        """The tower's settings, as those of transformers' wrapper of timm; raises ConfigError."""
        name = vision.require("architecture", *_ARCHITECTURES)
        (token, wider), options = _ARCHITECTURES[name], dict(vision.take("model_args", {}))
        for unused in ("do_pooling", "num_classes", "label_names"):  # of a classifier, which is not there
            vision.take(unused)
        if options.pop("global_pool", "map") != "":
            raise ConfigError("vision_config: model_args has no global_pool = ''", "the model takes all patches")
        if options.pop("init_values", None) is None:
            raise ConfigError("vision_config: model_args has no init_values", "only scaled branches are supported")
        width, layers = options.pop("embed_dim", None), options.pop("depth", None)
        tile, reference = (_side(options.pop(key, None)) for key in ("img_size", "ref_feat_shape"))
        final_norm = options.pop("use_post_transformer_norm", True) is not False
        if options:
            raise ConfigError(f"vision_config: model_args {options} is not supported", "leave it out")
        stated = {"embed_dim": width, "depth": layers, "img_size": tile, "ref_feat_shape": reference}
        wrong = [key for key, value in stated.items() if not isinstance(value, int) or value < 1]
        wrong += ["img_size"] if tile % _PATCH else []
        if wrong or width % (4 * _HEADS):
            raise ConfigError(
                f"vision_config: model_args has {wrong[0] if wrong else f'embed_dim = {width}'}, which makes no tower",
                f"needed are embed_dim, a multiple of {4 * _HEADS}, depth, and the sides of squares: img_size, a "
                f"multiple of {_PATCH}, and ref_feat_shape",
            )
        sizes = QwenVlConfig(width, int(width * wider), layers, _HEADS, _CHANNELS * _PATCH**2, 1, _EPS, "gelu")
        return cls(sizes, tile, reference, token, final_norm)

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // _PATCH


def _side(value: object) -> int:
    """The side of a square; 0 for what is none."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    return sides[0] if len(sides) == 2 and sides[0] == sides[1] and isinstance(sides[0], int) else 0


class PerceptionEncoder(nn.Module):
    """pixel_values [N, 3, tile, tile] float32 → vision_hidden [N, patches², D], without the class token.

    `positions` [S, D] holds the class token in its first row, added to that row's position; `cos` and `sin` [S, 1, 1,
    D/(2·heads)] leave it as it is.
    """

    def __init__(self, config: PerceptionConfig):
        super().__init__()
        sizes, length = config.sizes, config.patches**2 + config.token
        self.token = config.token
        convolution = nn.Conv2d(_CHANNELS, sizes.hidden_size, _PATCH, _PATCH, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.positions = nn.Parameter(torch.empty(length, sizes.hidden_size))
        turns = (length, 1, 1, sizes.hidden_size // sizes.heads // 2)
        self.cos, self.sin = (nn.Parameter(torch.empty(turns)) for _ in range(2))
        self.norm_pre = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.blocks = nn.ModuleList([_Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps) if config.final_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed["proj"](pixel_values).flatten(2).transpose(1, 2)
        # A row of zeros for the class token: a constant pad, where expanding a parameter needs the batch size.
        hidden = self.norm_pre(nn.functional.pad(patches, (0, 0, int(self.token), 0)) + self.positions)
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin)
        return self.norm(hidden[:, 1:] if self.token else hidden)


class _Block(nn.Module):
    """Pre-norm transformer layer [N, S, D] → [N, S, D] whose branches are scaled per channel."""

    def __init__(self, config: QwenVlConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, eps=config.norm_eps) for _ in range(2))
        self.attn = QwenVlAttention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.empty(config.hidden_size)) for _ in range(2))

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.gamma_1 * self.attn(self.norm1(hidden), cos, sin)
        return hidden + self.gamma_2 * self.mlp(self.norm2(hidden))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def perception_derived(config: PerceptionConfig, weights: Weights, prefix: str) -> dict[str, Callable[[], np.ndarray]]:
    """The tower's parameters that are not tensors of a checkpoint, by name: positions with the class token, the turns
    of each place, and projections whose pairs lie a half apart. `prefix` is the tower's in the checkpoint."""
    sizes, width = config.sizes, config.sizes.hidden_size
    table = f"{prefix}pos_embed", (1, config.patches**2 + config.token, width)
    if config.token:
        positions = weights.with_row(*table, f"{prefix}cls_token", (1, 1, width))
    else:
        stored = weights.use(*table)
        positions = lambda: stored()[0]  # noqa: E731
    found = {"positions": positions, "cos": lambda: np.cos(_turns(config)), "sin": lambda: np.sin(_turns(config))}
    for i in range(sizes.layers):
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            name = f"blocks.{i}.attn.qkv.{kind}"
            found[name] = partial(_parted, weights.use(prefix + name, shape), sizes.heads)
    return found


def _turns(config: PerceptionConfig) -> np.ndarray:
    """Angles [S, 1, 1, D/(2·heads)] float32: the first half of a head's pairs is turned by a patch's column, the second
    by its row, both counted from 1 where there is a class token, which is not turned."""
    quarter = config.sizes.hidden_size // config.sizes.heads // 4
    places = (np.arange(config.patches) + int(config.token)) * (config.reference / config.patches)
    angles = places[:, None] * _THETA ** (-np.arange(quarter) / quarter)
    rows, cols = np.indices((config.patches,) * 2).reshape(2, -1)
    turns = np.concatenate([angles[cols], angles[rows]], axis=1)
    return np.pad(turns, ((int(config.token), 0), (0, 0))).astype(np.float32)[:, None, None]


def _parted(stored: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """Rows of q, k and v [3·D, …], of which q's and k's are pairs of neighbours, with these a half of a head apart."""
    values = stored()
    query_key, value = np.split(values, [2 * len(values) // 3])
    pairs = query_key.reshape(2 * heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(query_key.shape), value])
