"""Rotary tables on the host: every kind of rope becomes plain cos and sin rows.

The kinds are those of transformers' `modeling_rope_utils`, whose results they reproduce.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_edge.spec import RopeSpec

__all__ = ["RotaryTable", "check_positions", "inverse_frequencies", "rope_tables"]

_AXES = 3


def inverse_frequencies(rope: RopeSpec, length: int = 0) -> np.ndarray:
    """Radians per position for each pair of elements, [dim/2] float64.

    `length`: positions of the whole sequence, those to come excluded; only kinds that depend on it look at it.
    """
    if rope.kind == "dynamic":
        return _powers(_dynamic_theta(rope, length), rope.dim)
    base = _powers(rope.theta, rope.dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope)
    if rope.kind == "longrope":
        beyond = length > rope.original_max_positions
        return base / np.array(rope.long_factors if beyond else rope.short_factors)
    return base


def rope_tables(rope: RopeSpec, positions: np.ndarray, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions [S] (or, with sections, [3, S]), each [S, dim/2] float32.

    `length` is that of the whole sequence, by default the highest position + 1, as in transformers' forward. The
    product is rounded to float32 before cos and sin, as the reference implementations do. Raises ValueError for
    positions of another shape.
    """
    check_positions((rope,), positions, positions.shape[-1] if positions.ndim else 0)
    if length is None:
        length = int(positions.max(initial=-1)) + 1
    frequencies = inverse_frequencies(rope, length).astype(np.float32)
    rows = positions.astype(np.float32)
    columns = rows[:, None] if rows.ndim == 1 else rows[_pair_axes(rope)].T
    angles = columns * frequencies
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def check_positions(ropes: Sequence[RopeSpec], positions: np.ndarray, tokens: int) -> None:
    """Raise ValueError unless positions are [tokens] or, for ropes with sections, [3, tokens]."""
    allowed = [(tokens,), (_AXES, tokens)] if any(rope.sections for rope in ropes) else [(tokens,)]
    if positions.shape not in allowed:
        raise ValueError(f"positions {list(positions.shape)}, expected {' or '.join(str(list(s)) for s in allowed)}")


class RotaryTable:
    """`cos` and `sin` [capacity, dim/2] of `dtype`: a row per place in the cache, for the token that is written there.

    Rows of a kind that does not depend on the sequence's length are made once. Else each step writes the rows of its
    own tokens, with frequencies for the length reached by then; this is what transformers does. Keys that are cached
    already keep the rotation of the step that made them: a sequence that grows past the limit token by token differs
    from one that was prefilled whole, here and there. (transformers' `dynamic` also remembers the longest sequence it
    has seen, until one within the limit comes; here a length always gives the same rows. Its Phi-3 starts over with the
    whole sequence when `generate` crosses the limit; forward does not, nor does this.)
    """

    def __init__(self, rope: RopeSpec, capacity: int, dtype: Any = np.float32):
        self._rope = rope
        self.cos, self.sin = (table.astype(dtype, copy=False) for table in rope_tables(rope, np.arange(capacity)))
        self._fixed = not rope.depends_on_length

    def place(self, past: int, tokens: int, positions: np.ndarray | None = None, length: int | None = None) -> bool:
        """Make the rows [past, past + tokens) right; whether any was written.

        `positions` as in `rope_tables`, by default those of the places themselves. `length`: of the sequence when
        all of its current piece is in (a prompt fed in chunks is one piece); by default the highest position + 1.
        """
        # Given positions may overwrite rows that a later sequence expects to be the places' own.
        self._fixed = self._fixed and positions is None
        if self._fixed:
            return False
        if positions is None:
            positions = np.arange(past, past + tokens)
        rows = slice(past, past + tokens)
        self.cos[rows], self.sin[rows] = rope_tables(self._rope, positions, length)
        return True


def _powers(theta: float, dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _dynamic_theta(rope: RopeSpec, length: int) -> float:
    """NTK-aware theta, the lowest frequency divided by the stretch (bloc97 and emozilla, 2023)."""
    beyond = max(length, rope.original_max_positions) / rope.original_max_positions
    stretch = rope.factor * beyond - (rope.factor - 1)
    return rope.theta * stretch ** (rope.dim / (rope.dim - 2))


def _llama3(base: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1 model card)."""
    wavelength = 2 * np.pi / base
    turns = rope.original_max_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return base * np.clip(blend, 0.0, 1.0) + base / rope.factor * (1.0 - np.clip(blend, 0.0, 1.0))


def _yarn(base: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Pairs are kept up to the one with `beta_fast` turns, slowed by `factor` from the one with `beta_slow` turns, and
    blended linearly in their index between (YaRN, arXiv 2309.00071, section 3.2)."""
    low, high = (_pair_with_turns(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # dim − 1, although there are only dim/2 pairs: the published code has it so, and models were trained with it.
    low, high = max(low, 0), min(high, rope.dim - 1)
    slowed = np.clip((np.arange(rope.dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return base * (1.0 - slowed) + base / rope.factor * slowed


def _pair_with_turns(rope: RopeSpec, turns: float) -> float:
    """The (fractional) index of the pair that turns so many times within `original_max_positions`."""
    return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _pair_axes(rope: RopeSpec) -> np.ndarray:
    """Which axis (0 time, 1 row, 2 column) turns each pair, [dim/2]."""
    if rope.layout == "sectioned":
        return np.repeat(np.arange(_AXES), rope.sections)
    axes = np.zeros(rope.dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : rope.sections[axis] * _AXES : _AXES] = axis
    return axes
