"""What a family hands to the pipeline: everything the export needs to know about one checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mllm_edge.export.checkpoint.texts import Texts
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.graph.ranges import TILES, TOKENS, symbols
from mllm_edge.spec import ModelSpec, SymbolRange, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "TracedComponent", "tile_components"]


@dataclass(frozen=True)
class TracedComponent:
    """A component made from a thin torch module, traced without weights.

    A parameter `p` of the module is read from the checkpoint tensor `prefix + p`, unless `derived` computes it.
    Dimensions that are words may have any size, the same word the same one: one of its `ranges`, else one for each
    token of a prompt. Inputs of dtype float32 take the graph's float type, others (int64) their own.
    """

    name: str
    module: "Callable[[], torch.nn.Module]"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prefix: str
    derived: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    ranges: Mapping[str, SymbolRange] = field(default_factory=dict)

    @property
    def all_ranges(self) -> dict[str, SymbolRange]:
        """Of every symbol of the inputs."""
        return {symbol: self.ranges.get(symbol, TOKENS) for symbol in symbols(self.inputs)}


def tile_components(
    encoder: "Callable[[], torch.nn.Module]",
    connector: "Callable[[], torch.nn.Module]",
    pixels: tuple[int, ...],
    hidden: tuple[int, int],
    features: tuple[int, int],
    prefixes: tuple[str, str],
    derived: Mapping[str, Callable[[], np.ndarray]],
) -> tuple[TracedComponent, TracedComponent]:
    """Vision encoder and connector of images as tiles: pixel_values [tiles, *pixels] → vision_hidden [tiles, *hidden] →
    image_features [tiles, *features]. `prefixes` are the two's; `derived` is the encoder's."""
    seen = TensorSpec("vision_hidden", "float32", ("tiles", *hidden))
    shown = TensorSpec("pixel_values", "float32", ("tiles", *pixels))
    found = TensorSpec("image_features", "float32", ("tiles", *features))
    return (
        TracedComponent("vision_encoder", encoder, (shown,), (seen,), prefixes[0], derived, {"tiles": TILES}),
        TracedComponent("connector", connector, (seen,), (found,), prefixes[1], ranges={"tiles": TILES}),
    )


@dataclass(frozen=True)
class Plan:
    """A checkpoint, understood. `embedding` names the token embedding; `ignored` the tensors rightly left out."""

    model: ModelSpec
    decoder: DecoderSpec
    traced: tuple[TracedComponent, ...]
    embedding: str
    texts: Texts
    ignored: tuple[str, ...] = ()
