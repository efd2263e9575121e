"""FastViT-HD, the tower of FastVLM: convolutions that halve the image's sides six times, attention between the few
patches of its last stages, and a gate for each channel at the end.

Parameter names follow timm, of the form without branches; `fastvit_derived` makes those that no checkpoint has so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.vision.modules import Linear, activate, packed_attention

__all__ = ["PATCH", "FastVit", "FastVitConfig", "fastvit_derived", "fastvit_unused"]

PATCH = 64  # px along the side of what becomes one feature
# Layers of each stage, and its channels.
_ARCHITECTURES = {
    "fastvit_mci3": ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)),
    "fastvit_mci4": ((2, 12, 24, 4, 4), (128, 256, 512, 1024, 2048)),
}
# Fixed in the architecture.
_CONVOLVED = 3  # stages; those behind them look at all patches
_HEAD, _INNER, _OUTER, _GATE = 32, 4, 2, 16
_EPS = 1e-5


@dataclass(frozen=True)
class FastVitConfig:
    """Sizes of the tower: layers and channels of each stage. `tile` is the side in px of the images that it sees."""

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    tile: int

    @classmethod
    def read(cls, vision: ConfigReader, tile: int) -> "FastVitConfig":
        """A tower's settings, as those of transformers' wrapper of timm; raises ConfigError."""
        layers, widths = _ARCHITECTURES[vision.require("architecture", *_ARCHITECTURES)]
        options = dict(vision.take("model_args", {}))
        if options.pop("inference_mode", False) is not True:
            raise ConfigError(
                "vision_config: model_args has no inference_mode = True", "merge the branches of training first (timm)"
            )
        layers = tuple(options.pop("layers", layers))
        widths = tuple(options.pop("embed_dims", widths))
        if options:
            raise ConfigError(f"vision_config: model_args {options} is not supported", "leave it out")
        halved = any(after % before for before, after in pairwise(widths))
        if len(layers) != 5 or len(widths) != 5 or halved or any(width % _HEAD for width in widths[_CONVOLVED:]):
            raise ConfigError(
                f"vision_config: model_args has layers = {list(layers)}, embed_dims = {list(widths)}",
                f"expected five of each, widths that are multiples of the one before, the last two of {_HEAD}",
            )
        for unused in ("do_pooling", "num_classes", "label_names"):  # of a classifier, which is not there
            vision.take(unused)
        stated = vision.take("hidden_size", _OUTER * widths[-1])
        if stated != _OUTER * widths[-1]:
            raise ConfigError(
                f"vision_config: hidden_size {stated}, the tower makes {_OUTER * widths[-1]} values", OWN_CONFIG
            )
        if tile % PATCH:
            raise ConfigError(f"the image processor makes tiles of {tile} px, no multiple of {PATCH}", OWN_PROCESSOR)
        return cls(layers, widths, tile)

    @property
    def hidden_size(self) -> int:
        """Values of a feature."""
        return _OUTER * self.widths[-1]

    @property
    def tokens(self) -> int:
        """Features of a tile."""
        return (self.tile // PATCH) ** 2

    def blocks(self) -> Iterator[tuple[str, int]]:
        """Each layer's name, and its channels."""
        for stage, (layers, width) in enumerate(zip(self.layers, self.widths, strict=True)):
            yield from ((f"stages.{stage}.blocks.{i}.", width) for i in range(layers))


class FastVit(nn.Module):
    """pixel_values [N, 3, tile, tile] float32 → vision_hidden [N, (tile / 64)², hidden_size]."""

    def __init__(self, config: FastVitConfig):
        super().__init__()
        first, *_, last = config.widths
        self.stem = nn.Sequential(
            _Convolved(3, first, 3, 2), _Convolved(first, first, 3, 2, first), _Convolved(first, first, 1)
        )
        before = (None, *config.widths)
        self.stages = nn.Sequential(
            *(
                _Stage(before[i], width, layers, i >= _CONVOLVED)
                for i, (layers, width) in enumerate(zip(config.layers, config.widths, strict=True))
            )
        )
        self.final_conv = _Gated(last, config.hidden_size, config.tokens)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.final_conv(self.stages(self.stem(pixel_values))).flatten(2).transpose(1, 2)


class _Convolved(nn.Module):
    """[N, C, rows, columns] → a convolution, then GELU; the edges are padded."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.reparam_conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activate("gelu", self.reparam_conv(x))


class _Stage(nn.Module):
    """[N, before, rows, columns] → [N, width, rows / 2, columns / 2], or the same size where `before` is None."""

    def __init__(self, before: int | None, width: int, layers: int, looks: bool):
        super().__init__()
        self.downsample = nn.Identity() if before is None else _Downsample(before, width)
        self.pos_emb = _Mixer(width, 7) if looks else nn.Identity()
        self.blocks = nn.Sequential(*(_Looking(width) if looks else _Mixing(width) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.pos_emb(self.downsample(x)))


class _Downsample(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Sequential(_Convolved(inputs, outputs, 7, 2, inputs), _Convolved(outputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class _Mixer(nn.Module):
    """Each channel of [N, C, rows, columns] by itself, over kernel × kernel patches."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.reparam_conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reparam_conv(x)


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class _ConvMlp(nn.Module):
    """[N, C, rows, columns] → the same: each channel over 7 × 7 patches, then two layers over each patch."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.fc1, self.fc2 = nn.Conv2d(width, _INNER * width, 1), nn.Conv2d(_INNER * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(activate("gelu", self.fc1(self.conv(x))))


class _Mixing(nn.Module):
    """A layer of convolutions alone."""

    def __init__(self, width: int):
        super().__init__()
        self.token_mixer, self.mlp, self.layer_scale = _Mixer(width, 3), _ConvMlp(width), _Scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class _Looking(nn.Module):
    """A layer whose patches see each other."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.token_mixer = nn.LayerNorm(width, eps=_EPS), _Attention(width)
        self.mlp, self.layer_scale_1, self.layer_scale_2 = _ConvMlp(width), _Scale(width), _Scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.token_mixer(self.norm(x.flatten(2).transpose(1, 2)))
        x = x + self.layer_scale_1(seen.transpose(1, 2).reshape(-1, *x.shape[1:]))
        return x + self.layer_scale_2(self.mlp(x))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // _HEAD
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(packed_attention(self.qkv(x), self.heads))


class _Gated(nn.Module):
    """A convolution [N, C, rows, columns] → [N, outputs, rows, columns], each channel times a gate that all channels'
    means decide, then GELU."""

    def __init__(self, inputs: int, outputs: int, patches: int):
        super().__init__()
        self.reparam_conv = nn.Conv2d(inputs, outputs, 3, padding=1, groups=inputs)
        self.se = nn.ModuleDict(
            {"fc1": nn.Conv2d(outputs, _gates(outputs), 1), "fc2": nn.Conv2d(_gates(outputs), outputs, 1)}
        )
        self.shares = nn.Parameter(torch.empty(patches, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reparam_conv(x)
        # A product: a mean over axes is traced with these reshaped, which TensorRT's parser does not take for constant.
        means = (x.flatten(2) @ self.shares).unsqueeze(-1)
        gate = torch.sigmoid(self.se["fc2"](activate("relu", self.se["fc1"](means))))
        return activate("gelu", x * gate)


def _gates(width: int) -> int:
    """Values between the two layers of a gate for so many channels."""
    return max(1, int(width / _GATE + 0.5))


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def fastvit_derived(config: FastVitConfig, weights: Weights, prefix: str) -> dict[str, Callable[[], np.ndarray]]:
    """The tower's parameters that are not tensors of a checkpoint, by name: convolutions with the batch norm behind
    them, and the patches' shares in a mean. `prefix` is the tower's in the checkpoint."""
    patches = config.tokens
    found = {"final_conv.shares": lambda: np.full((patches, 1), 1 / patches, np.float32)}
    for block, width in config.blocks():
        name = f"{block}mlp.conv"
        kernel = weights.use(f"{prefix}{name}.conv.weight", (width, 1, 7, 7))
        norm = [weights.use(f"{prefix}{name}.bn.{part}", (width,)) for part in _NORM]
        found[f"{name}.weight"] = partial(_scaled, kernel, *norm)
        found[f"{name}.bias"] = partial(_shifted, *norm)
    return found


_NORM = ("weight", "bias", "running_mean", "running_var")
_Read = Callable[[], np.ndarray]


def _scaled(kernel: _Read, weight: _Read, _: _Read, __: _Read, variance: _Read) -> np.ndarray:
    return kernel() * (weight() / np.sqrt(variance() + _EPS))[:, None, None, None]


def _shifted(weight: _Read, bias: _Read, mean: _Read, variance: _Read) -> np.ndarray:
    return bias() - mean() * weight() / np.sqrt(variance() + _EPS)


def fastvit_unused(config: FastVitConfig, prefix: str) -> tuple[str, ...]:
    """Names of tensors that only training needs."""
    return tuple(f"{prefix}{block}mlp.conv.bn.num_batches_tracked" for block, _ in config.blocks())
