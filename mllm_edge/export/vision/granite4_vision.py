"""Granite 4 Vision's connector: for several layers of the tower and of the decoder, queries that look at windows of a
tile (Q-Formers).

Parameter names follow the checkpoint; `window_derived` makes those that no checkpoint has so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, activate, attention

__all__ = ["Projector", "QFormerConfig", "WindowConfig", "WindowConnector", "window_derived"]

_NORM_EPS = 1e-6  # fixed in the reference
_OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the patches in a square of two, that a spatial projector takes


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the layers that queries go through; every `crossing`-th of them looks at patches."""

    layers: int
    heads: int
    intermediate_size: int
    crossing: int
    activation: str
    norm_eps: float

    @classmethod
    def read(cls, qformer: ConfigReader, width: int) -> "QFormerConfig":
        """The settings of Q-Formers over patches of so many values; raises ConfigError."""
        for unused in ("vocab_size", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            qformer.take(unused)  # of a text, which they have not; of training
        qformer.require("use_qformer_text_input", False)
        hidden, heads = qformer.heads()
        if (hidden, qformer.take("encoder_hidden_size")) != (width, width):
            raise ConfigError(f"qformer_config: hidden_size {hidden}, the tower's is {width}", OWN_CONFIG)
        return cls(
            layers=qformer.positive("num_hidden_layers"),
            heads=heads,
            intermediate_size=qformer.positive("intermediate_size"),
            crossing=qformer.positive("cross_attention_frequency"),
            activation=qformer.require("hidden_act", *ACTIVATIONS),
            norm_eps=qformer.take("layer_norm_eps"),
        )


@dataclass(frozen=True)
class Projector:
    """Looks at the tower's `tap`-th state that is seen. `kind` and `number` are its name; what stands before layer
    `layer` of the decoder gets its features."""

    kind: str
    number: int
    tap: int
    layer: int


@dataclass(frozen=True)
class WindowConfig:
    """Sizes of the connector: windows of `window` × `window` patches of a tile of `side` × `side`, each of which makes
    `query` × `query` features. `projectors` by the layers of the decoder, of which the first is 0."""

    qformer: QFormerConfig
    width: int
    outputs: int
    side: int
    window: int
    query: int
    projectors: tuple[Projector, ...]

    @property
    def windows(self) -> int:
        """Along a side of a tile."""
        return self.side // self.window

    @property
    def features(self) -> int:
        """Along a side of a tile."""
        return self.windows * self.query


class WindowConnector(nn.Module):
    """vision_hidden [N, side², taps · width] → for each projector features [N, features², outputs]."""

    def __init__(self, config: WindowConfig):
        super().__init__()
        self.config = config
        for kind in dict.fromkeys(projector.kind for projector in config.projectors):
            count = sum(projector.kind == kind for projector in config.projectors)
            self.add_module(kind, nn.ModuleList([_Projector(config) for _ in range(count)]))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        width = self.config.width
        return tuple(
            self.get_submodule(f"{p.kind}.{p.number}")(hidden[..., p.tap * width : (p.tap + 1) * width])
            for p in self.config.projectors
        )


class _Projector(nn.Module):
    """patches [N, side², D] → features [N, features², outputs]. `sampling` [features², side²] makes the patches that
    queries begin from, window by window."""

    def __init__(self, config: WindowConfig):
        super().__init__()
        self.config, width = config, config.width
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.sampling = nn.Parameter(torch.empty(config.features**2, config.side**2))
        self.query = nn.Parameter(torch.empty(1, config.query**2, width))
        self.image_positions = nn.Parameter(torch.empty(1, config.window**2, width))
        self.qformer = _QFormer(config.qformer, width)
        self.out_linear = Linear(width, config.outputs)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        config, patches = self.config, self.norm(patches)
        count, window, query, width = config.windows, config.window, config.query, config.width
        seen = patches.reshape(-1, count, window, count, window, width).transpose(2, 3).reshape(-1, window**2, width)
        # A product: what is sampled may be means over areas of unequal sizes.
        queries = self.query + (self.sampling @ patches).reshape(-1, query**2, width)
        found = self.qformer(queries, seen + self.image_positions)
        rows = found.reshape(-1, count, count, query, query, width).transpose(2, 3)
        return self.out_linear(rows.reshape(-1, config.features**2, width))


class _QFormer(nn.Module):
    """queries [N, Q, D] that look at patches [N, P, D] → [N, Q, D]; norms stand behind each branch."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        layers = [_Layer(config, width, i % config.crossing == 0) for i in range(config.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        hidden = self.layernorm(queries)
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, patches)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: QFormerConfig, width: int, crosses: bool):
        super().__init__()
        self.attention = _Attention(config, width)
        self.crossattention = _Attention(config, width) if crosses else None
        self.intermediate_query = nn.ModuleDict({"dense": Linear(width, config.intermediate_size)})
        self.output_query = _Output(config.intermediate_size, width, config.norm_eps)
        self.activation = config.activation

    def forward(self, hidden: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, patches)
        inner = activate(self.activation, self.intermediate_query["dense"](hidden))
        return self.output_query(inner, hidden)


class _Attention(nn.Module):
    """hidden [N, Q, D] looks at seen [N, P, D] → [N, Q, D]."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        self.heads = config.heads
        self.attention = nn.ModuleDict({name: Linear(width, width) for name in ("query", "key", "value")})
        self.output = _Output(width, width, config.norm_eps)

    def forward(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attention["query"], self.attention["key"], self.attention["value"]
        return self.output(attention(query(hidden), key(seen), value(seen), self.heads), hidden)


class _Output(nn.Module):
    """A layer, whose output is added to the stream, and a norm."""

    def __init__(self, inputs: int, width: int, eps: float):
        super().__init__()
        self.dense = Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + stream)


# ---------------------------------------------------------------- parameters that no checkpoint has as they are
def window_derived(config: WindowConfig, spatial: str) -> dict[str, Callable[[], np.ndarray]]:
    """What each projector samples: one patch of each square of two, where its kind is `spatial`, else means over the
    areas of patches that a feature stands for."""
    found: dict[str, Callable[[], np.ndarray]] = {}
    for p in config.projectors:
        offset = _OFFSETS[p.number] if p.kind == spatial else None
        found[f"{p.kind}.{p.number}.sampling"] = lambda offset=offset: _sampling(config, offset)  # type: ignore[misc]
    return found


def _sampling(config: WindowConfig, offset: tuple[int, int] | None) -> np.ndarray:
    """[features², side²] float32, window by window."""
    side, features = config.side, config.features
    rows, cols = (np.zeros((features, side)) for _ in range(2))
    for axis, shares in enumerate((rows, cols)):
        for i, (start, end) in enumerate(_areas(side, features)):
            if offset is None:
                shares[i, start:end] = 1 / (end - start)
            else:
                shares[i, 2 * i + offset[axis]] = 1
    shares = np.einsum("ip,jq->ijpq", rows, cols).reshape(features, features, side**2)
    windows = shares.reshape(config.windows, config.query, config.windows, config.query, -1).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(windows.reshape(features**2, side**2), np.float32)


def _areas(side: int, features: int) -> Iterator[tuple[int, int]]:
    """First and last patch, exclusively, that each feature along a side stands for."""
    yield from ((i * side // features, -(-(i + 1) * side // features)) for i in range(features))
