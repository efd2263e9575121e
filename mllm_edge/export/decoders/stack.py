"""Stacks whose layers differ in what they see: layer types of a configuration to windows and indices."""

from collections.abc import Sequence
from dataclasses import replace

from mllm_edge.errors import ConfigError
from mllm_edge.graph.decoder_spec import LayerSpec

__all__ = ["mixed_windows", "windowed"]

_TYPES = ("full_attention", "sliding_attention")


def mixed_windows(types: Sequence[str], window: int | None) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """`windows` of a DecoderSpec, and the index of each layer's; raises ConfigError for a type nobody handles."""
    for kind in types:
        if kind not in _TYPES:
            raise ConfigError(f"layer_types: {kind!r} is not supported", f"supported: {', '.join(_TYPES)}")
    sizes = [window if kind == "sliding_attention" else None for kind in types]
    windows = tuple(dict.fromkeys(sizes))
    return windows, tuple(windows.index(size) for size in sizes)


def windowed(layer: LayerSpec, indices: Sequence[int]) -> tuple[LayerSpec, ...]:
    """One such layer for each index into `windows`."""
    return tuple(replace(layer, window=index) for index in indices)
