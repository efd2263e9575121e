"""Rotary tables against transformers' own."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mllm_edge.runtime.positions import rope_tables
from mllm_edge.spec import RopeSpec

CASES: list[tuple[RopeSpec, dict[str, Any]]] = [
    (RopeSpec(10000.0, 64), {"rope_type": "default", "rope_theta": 10000.0}),
    (RopeSpec(1e6, 80), {"rope_type": "default", "rope_theta": 1e6}),
    (RopeSpec(1e4, 32, "linear", 4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    (
        RopeSpec(5e5, 128, "llama3", 8.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), CASES, ids=["default", "large_theta", "linear", "llama3"])
def test_tables_equal_transformers(rope: RopeSpec, parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=4 * rope.dim,
        num_attention_heads=4,
        head_dim=rope.dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    positions = np.array([0, 1, 2, 77, 1023, 8191, 40000])
    reference = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions)[None])
    for ours, theirs in zip(rope_tables(rope, positions), reference, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (len(positions), rope.dim // 2)
        # Angles reach 4e4 rad: one rounding of a frequency in float32 moves them by up to 4e4 · 6e-8.
        np.testing.assert_allclose(ours, theirs[0, :, : rope.dim // 2].numpy(), atol=5e-3)
        np.testing.assert_allclose(ours[:5], theirs[0, :5, : rope.dim // 2].numpy(), atol=2e-4)
