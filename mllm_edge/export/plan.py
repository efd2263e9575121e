"""What a family hands to the pipeline: everything the export needs to know about one checkpoint."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from mllm_edge.export.checkpoint.texts import Texts
from mllm_edge.graph.decoder_spec import DecoderSpec, PositionTable
from mllm_edge.graph.ranges import TILES, TOKENS, symbols
from mllm_edge.spec import (
    DEEPSTACK,
    AspectRatioId,
    FitPatches,
    GridMerge,
    GridRope,
    ImageSpec,
    LearnedPositions,
    ModelSpec,
    ResizeToPixels,
    ResizeToSide,
    ResizeWithin,
    ShrinkInto,
    SplitLarge,
    Stage,
    SymbolRange,
    Table,
    TensorSpec,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "POSITIONS",
    "TEXT_POSITIONS",
    "Plan",
    "TracedComponent",
    "cell_components",
    "cell_ranges",
    "table_specs",
    "tile_components",
]

# Files of the bundle: what the host needs for the positions of a decoder, and of a text encoder.
POSITIONS, TEXT_POSITIONS = "position_table.npy", "text_position_table.npy"


@dataclass(frozen=True)
class TracedComponent:
    """A component made from a thin torch module, traced without weights.

    A parameter `p` of the module is read from the checkpoint tensor `prefix + p`, unless `derived` computes it.
    Dimensions that are words may have any size, the same word the same one: one of its `ranges`, else one for each
    token of a prompt. Inputs of dtype float32 take the graph's float type, others (int64) their own.
    """

    stage: Stage
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

    @property
    def name(self) -> str:
        """The component's."""
        return self.stage.component


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
        TracedComponent(
            Stage("vision_encoder", "vision", "slice"),
            encoder,
            (shown,),
            (seen,),
            prefixes[0],
            derived,
            {"tiles": TILES},
        ),
        TracedComponent(
            Stage("connector", "connector", "slice"), connector, (seen,), (found,), prefixes[1], ranges={"tiles": TILES}
        ),
    )


def cell_components(
    encoder: "Callable[[], torch.nn.Module]",
    connector: "Callable[[], torch.nn.Module]",
    image: ImageSpec,
    sizes: tuple[int, int],
    prefixes: tuple[str, str],
    derived: Mapping[str, Callable[[], np.ndarray]],
    deepstack: int = 0,
    of_connector: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> tuple[TracedComponent, TracedComponent]:
    """Vision encoder and connector of images as cells of patches, one grid a run: pixel_values [cells, merge², values]
    and the image's tables → vision_hidden [cells, merge², D] → image_features [cells, H], or [merged, H] where a table
    says which cells the connector merges, or [features, H] of the grid. `sizes` are D and H.

    `derived` is the encoder's, `of_connector` the connector's. The encoder also gives `deepstack` further features,
    deepstack.{k} [cells, H]."""
    patches = image.patches
    assert patches is not None
    seen = TensorSpec("vision_hidden", "float32", ("cells", patches.merge**2, sizes[0]))
    shown = TensorSpec("pixel_values", "float32", ("cells", *image.shape))
    merged = tuple(
        spec for table in image.tables if isinstance(table, GridMerge) for spec in table_specs(table, patches.merge)
    )
    rows = image.features if image.resampled else "merged" if merged else "cells"
    found = TensorSpec("image_features", "float32", (rows, sizes[1]))
    added = tuple(TensorSpec(f"{DEEPSTACK}{k}", "float32", ("cells", sizes[1])) for k in range(deepstack))
    ranges = cell_ranges(image)
    tables = (spec for table in image.tables for spec in table_specs(table, patches.merge) if spec not in merged)
    inputs = (shown, *tables)
    return (
        TracedComponent(
            Stage("vision_encoder", "vision", "image"), encoder, inputs, (seen, *added), prefixes[0], derived, ranges
        ),
        TracedComponent(
            Stage("connector", "connector", "image"),
            connector,
            (seen, *merged),
            (found,),
            prefixes[1],
            of_connector,
            ranges,
        ),
    )


def cell_ranges(image: ImageSpec) -> dict[str, SymbolRange]:
    """Of the cells and windows of one grid: as many as its transforms make, and the context takes."""
    areas = [t.max_pixels // t.multiple**2 for t in image.transforms if isinstance(t, ResizeToPixels)]
    areas += [t.height * t.width // image.height**2 for t in image.transforms if isinstance(t, ShrinkInto)]
    areas += [(t.longest // t.patch) ** 2 for t in image.transforms if isinstance(t, FitPatches)]
    areas += [max(t.max_cells, (t.size // t.cell) ** 2) for t in image.transforms if isinstance(t, SplitLarge)]
    fitted = (t for t in image.transforms if isinstance(t, ResizeWithin))
    areas += [(math.ceil(t.longest_edge / t.multiple) * t.multiple // image.height) ** 2 for t in fitted]
    areas += [math.ceil(t.side / image.height) ** 2 for t in image.transforms if isinstance(t, ResizeToSide)]
    most = min(areas, default=None)
    usual = 256 if most is None else min(256, most)
    # A feature may be alone, with cells left over beside it on two sides. No image has more windows than cells.
    times = (2 * image.merged - 1) ** 2
    return dict.fromkeys(("cells", "windows"), SymbolRange(usual=usual, most=most, limit="max_seq", times=times))


def table_specs(table: Table, merge: int) -> tuple[TensorSpec, ...]:
    """The inputs that a table of images becomes."""
    if isinstance(table, GridRope):
        return tuple(TensorSpec(name, "float32", ("cells", merge**2, table.dim // 2)) for name in table.names)
    if isinstance(table, LearnedPositions):
        return (TensorSpec(table.names[0], "float32", ("cells", merge**2, table.dim)),)
    if isinstance(table, AspectRatioId):
        return tuple(TensorSpec(name, "int64", (1,)) for name in table.names)
    if isinstance(table, GridMerge):
        return (TensorSpec(table.names[0], "int64", ("merged", table.side**2)),)
    index, bias, back = table.names
    window = table.side**2 * merge**2
    return (
        TensorSpec(index, "int64", ("windows", table.side**2)),
        TensorSpec(bias, "float32", ("windows", 1, window, window)),
        TensorSpec(back, "int64", ("cells",)),
    )


@dataclass(frozen=True)
class Plan:
    """A checkpoint, understood. `embedding` names the token embedding; `ignored` the tensors rightly left out; `arrays`
    are those of `ImageSpec.arrays`, [rows, H], by file."""

    model: ModelSpec
    decoder: DecoderSpec
    traced: tuple[TracedComponent, ...]
    embedding: str
    texts: Texts
    ignored: tuple[str, ...] = ()
    arrays: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, PositionTable]:
        """Learned positions or scores of distances, which the host adds, by the file that holds them."""
        encoder = self.decoder.encoder
        found = {POSITIONS: self.decoder.table, TEXT_POSITIONS: None if encoder is None else encoder.table}
        return {file: table for file, table in found.items() if table is not None}
