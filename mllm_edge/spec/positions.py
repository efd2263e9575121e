"""Positions of tokens, as the decoder gets them."""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "PositionSpec",
    "RopeSpec",
]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first `dim` elements of a head, halves convention; the host computes cos and sin.

    `kind`:
    default   inverse frequencies theta^(−2i/dim)
    linear    all divided by `factor`
    dynamic   a theta that grows with the sequence beyond `original_max_positions` (`factor`)
    llama3    divided by wavelength, between `low_freq_factor` and `high_freq_factor` of `original_max_positions`
    yarn      divided by turns within `original_max_positions`, between `beta_fast` and `beta_slow` (`truncate`: the
              bounds are whole pairs)
    longrope  divided by `short_factors`, or by `long_factors` beyond `original_max_positions`; one factor per pair

    cos and sin are multiplied by `attention_factor`. With `sections` (M-RoPE) a position is (time, row, column):
    `sectioned` gives each axis that many consecutive pairs; `interleaved` takes every third pair for row and column,
    as many as their sections say, and time has the rest.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    layout: Literal["sectioned", "interleaved"] = "sectioned"

    @property
    def depends_on_length(self) -> bool:
        """Whether the rows of a position change as the sequence grows, so that no table made before stays right."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class PositionSpec:
    """How positions and order reach the decoder.

    `kind`:
    rope            `ropes` turn queries and keys; a layer's rope is one of them, its rows are the graph's inputs `cos`
                    and `sin`, or `cos.{k}` and `sin.{k}` for the second and later ones
    learned         a row of `table` [positions, hidden_size] is added to each embedding
    relative_bias   `table` [buckets, heads] scores the distance between query and key: half of the buckets are single
                    distances, the rest grow logarithmically up to `max_distance`
    none            no positions

    `windows`: how many of the latest positions a token sees, itself included (None: all before it); a layer's mask is
    the graph's input `attention_bias`, or `attention_bias.{k}`. `table` is a .npy file of the bundle.

    `images`: what the positions of an image's tokens follow.
    sequence        their places, like those of text
    grid            for ropes with sections: row r and column c of an image's grid, which begins at position p, are at
                    (p, p + r, p + c); what comes after the image goes on at p + the longer side of the grid
    """

    kind: Literal["rope", "learned", "relative_bias", "none"]
    ropes: tuple[RopeSpec, ...] = ()
    windows: tuple[int | None, ...] = (None,)
    table: str = ""
    max_distance: int = 0
    images: Literal["sequence", "grid"] = "sequence"
