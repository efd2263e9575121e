"""Rotary tables on the host: every kind of rope becomes plain cos and sin rows."""

import numpy as np

from mllm_edge.spec import RopeSpec

__all__ = ["inverse_frequencies", "rope_tables"]


def inverse_frequencies(rope: RopeSpec) -> np.ndarray:
    """Radians per position for each pair of elements, [dim/2] float64."""
    base = rope.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    return base


def rope_tables(rope: RopeSpec, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions [P] × frequencies, each [P, dim/2] float32.

    The product is rounded to float32 before cos and sin, as the reference implementations do.
    """
    frequencies = inverse_frequencies(rope).astype(np.float32)
    angles = positions.astype(np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)


def _llama3(base: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1 model card)."""
    wavelength = 2 * np.pi / base
    turns = rope.original_max_positions / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return base * np.clip(blend, 0.0, 1.0) + base / rope.factor * (1.0 - np.clip(blend, 0.0, 1.0))
