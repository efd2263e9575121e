"""Recipes: which precision each part of the model gets, as data."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["RECIPES", "Precision", "Recipe", "block_size", "recipe"]

_BLOCKS = (128, 64, 32)


@dataclass(frozen=True)
class Precision:
    """How a linear layer's weight is held.

    `kind` float32 | float16 (stored in half, computed in float32 where the CPU has no half kernels) | int8_dynamic
    (8-bit weight per output channel, activations quantized to uint8 at run time) | blocks (`bits` per weight with one
    scale per `largest_block` weights at most, activations quantized to int8 per block at run time).
    `method` names the module of `calibration.methods` that chooses codes and scales.
    """

    kind: Literal["float32", "float16", "int8_dynamic", "blocks"]
    bits: int = 32
    largest_block: int = 128
    method: Literal["rtn"] = "rtn"


FLOAT32 = Precision("float32")
FLOAT16 = Precision("float16", 16)
INT8_DYNAMIC = Precision("int8_dynamic", 8)
BLOCKS_8 = Precision("blocks", 8)
BLOCKS_4 = Precision("blocks", 4)


@dataclass(frozen=True)
class Recipe:
    """A named choice. `vision` covers the vision encoder's linear layers, `head` the projection onto the vocabulary."""

    name: str
    vision: Precision
    connector: Precision
    decoder: Precision
    head: Precision


# The head keeps 8 bits in int4: a 4-bit head makes small models repeat themselves; its block is 64 (CPU kernels).
RECIPES = {
    "fp32": Recipe("fp32", FLOAT32, FLOAT32, FLOAT32, FLOAT32),
    "fp16": Recipe("fp16", FLOAT16, FLOAT16, FLOAT16, FLOAT16),
    "int8": Recipe("int8", INT8_DYNAMIC, INT8_DYNAMIC, BLOCKS_8, Precision("blocks", 8, 64)),
    "int4": Recipe("int4", INT8_DYNAMIC, INT8_DYNAMIC, BLOCKS_4, Precision("blocks", 8, 64)),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ValueError that lists the names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def block_size(row: int, largest: int) -> int:
    """The largest of 128, 64, 32 (up to `largest`) that divides a row of `row` weights; 32, padded, when none does."""
    return next((b for b in _BLOCKS if b <= largest and row % b == 0), 32)
