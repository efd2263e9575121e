"""Which sizes the symbolic dimensions of each kind of graph may have, for engines that are built for a range."""

from collections.abc import Iterable, Mapping
from typing import Literal

from mllm_edge.spec import ImageSpec, SymbolRange, TensorSpec

__all__ = ["CROSS_KV", "TEXT_ENCODER", "TILES", "TOKENS", "crossed_range", "decoder_ranges", "symbols", "used_ranges"]

_BATCH = SymbolRange(limit="max_batch")
# As many as a prompt has tokens.
TOKENS = SymbolRange(usual=256, limit="max_seq")
TILES = SymbolRange(usual=2, limit="max_images")
TEXT_ENCODER: Mapping[str, SymbolRange] = {"batch": _BATCH, "sequence": TOKENS}
CROSS_KV: Mapping[str, SymbolRange] = {"batch": _BATCH, "features": TOKENS}


def crossed_range(image: ImageSpec | None) -> SymbolRange:
    """Of the features that cross-attention looks at: of as many images as one run may have, or of a text."""
    if image is None or image.into != "cross_attention":
        return TOKENS
    rows = image.features * (image.tiles or 1)
    return SymbolRange(usual=rows, limit="max_images", times=rows)


def decoder_ranges(
    kv_mode: Literal["in_place", "append"], features: SymbolRange = TOKENS, whole: bool = False
) -> dict[str, SymbolRange]:
    """Of a decoder; `whole`: prompts come in one piece. Every number of new tokens may stand behind every past; which
    of them there is room for is the caller's concern in `append`, where the mask is as long as both. There is always a
    past there, if only one hidden row: nobody promises that kernels take an empty one."""
    append = kv_mode == "append"
    spanned = SymbolRange(sum_of=("past", "sequence")) if append else SymbolRange(1, 256, None, "max_seq", share=0.5)
    return {
        "batch": SymbolRange(most=1) if append else _BATCH,
        "rows": SymbolRange(limit="max_rows"),
        "sequence": SymbolRange(usual=256, limit="max_prompt" if whole else "max_new"),
        "past": SymbolRange(1, 1, None, "max_past", share=0.5),
        "length": spanned,
        "capacity": SymbolRange(None, limit="max_seq"),
        "features": features,
    }


def used_ranges(inputs: Iterable[TensorSpec], known: Mapping[str, SymbolRange]) -> dict[str, SymbolRange]:
    """The ranges that the symbols of `inputs` need, from `known`; raises KeyError for a symbol without one."""
    wanted = symbols(inputs)
    parts = [part for symbol in wanted for part in known[symbol].sum_of]
    return {symbol: known[symbol] for symbol in dict.fromkeys([*wanted, *parts])}


def symbols(tensors: Iterable[TensorSpec]) -> list[str]:
    """The symbolic dimensions, each once."""
    return list(dict.fromkeys(size for tensor in tensors for size in tensor.shape if isinstance(size, str)))
