"""Rotary tables against transformers' own."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.runtime.decode.positions import RotaryTable, inverse_frequencies, rope_tables
from mllm_edge.spec import RopeSpec

HEAD_DIM, CONTEXT, ORIGINAL = 64, 2048, 256
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
        "original_max_position_embeddings": ORIGINAL,
        **more,
    }


PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "large_theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear_partial": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.75},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic_partial": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
    "llama3": {**LLAMA3, "rope_theta": 5e5},
    "llama3_partial": {**LLAMA3, "partial_rotary_factor": 0.5},
    "yarn": YARN,
    "yarn_partial": {**YARN, "partial_rotary_factor": 0.25},
    "yarn_factor": {**YARN, "attention_factor": 1.5},
    "yarn_mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn_mscale_alone": {**YARN, "mscale": 1.2},
    "yarn_betas": {**YARN, "beta_fast": 16, "beta_slow": 2, "rope_theta": 1e6},
    "yarn_not_truncated": {**YARN, "truncate": False},
    "yarn_ratio": {**YARN, "factor": None},
    "longrope": longrope(HEAD_DIM // 2),
    "longrope_partial": longrope(HEAD_DIM // 4, partial_rotary_factor=0.5),
    "longrope_factor": longrope(HEAD_DIM // 2, factor=32.0),
    "longrope_attention": longrope(HEAD_DIM // 2, attention_factor=1.19),
}
# The limit of dynamic is the context, that of the other kinds the original length.
LENGTHS = [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT]


def llama_config(parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": 1e4, **parameters},
    )


def described(config: Any, mrope: Literal["sectioned", "interleaved"] | None = None) -> RopeSpec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return rope_spec(ConfigReader("config.json", config.to_dict(), {}), head_dim, partial=True, mrope=mrope)


def assert_equal_rows(
    ours: tuple[np.ndarray, np.ndarray], theirs: tuple[torch.Tensor, torch.Tensor], positions: np.ndarray
) -> None:
    """cos and sin [S, R/2] within 2e-7 + 4 · 2^-24 per position (seen: 2.9).

    The reference takes its powers in float32: a frequency (at most 1) may be off by a few units of 2^-24, and the
    angle by as much per position.
    """
    reach = (positions if positions.ndim == 1 else positions.max(axis=0))[:, None]
    for one, other in zip(ours, theirs, strict=True):
        expected = other[0].numpy()
        half = expected.shape[-1] // 2
        assert one.dtype == np.float32
        assert one.shape == (positions.shape[-1], half)
        assert (np.abs(one - expected[:, :half]) <= 2e-7 + reach * 2.0**-22).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_equal_transformers(name: str, length: int) -> None:
    config = llama_config(PARAMETERS[name])
    positions = np.arange(length)
    reference = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions)[None])
    assert_equal_rows(rope_tables(described(config), positions), reference, positions)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if PARAMETERS[name]["rope_type"] != "default"])
def test_frequencies_equal_transformers(name: str) -> None:
    config = llama_config(PARAMETERS[name])
    rope = described(config)
    for length in LENGTHS:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"), seq_len=length)
        np.testing.assert_allclose(inverse_frequencies(rope, length), frequencies.numpy(), rtol=5e-7)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("parameters", [None, longrope(12)], ids=["default", "longrope"])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_partial_tables_equal_phi3(parameters: dict[str, Any] | None, length: int) -> None:
    config = Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=ORIGINAL,
        partial_rotary_factor=0.75,
        rope_parameters=parameters,
    )
    rope, positions = described(config), np.arange(length)
    assert rope.dim == 24
    reference = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions)[None])
    assert_equal_rows(rope_tables(rope, positions), reference, positions)


SECTIONED = (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, "sectioned")
INTERLEAVED = (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, "interleaved")


@pytest.mark.parametrize(
    ("classes", "parameters"),
    [
        (SECTIONED, {"rope_type": "default", "mrope_section": [16, 24, 24]}),
        (SECTIONED, {"type": "mrope", "mrope_section": [16, 24, 24]}),
        (SECTIONED, {**YARN, "mrope_section": [8, 28, 28]}),
        (SECTIONED, {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [16, 24, 24]}),
        (INTERLEAVED, {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}),
        (INTERLEAVED, {"rope_type": "default", "mrope_section": [20, 20, 24]}),
        (INTERLEAVED, {**YARN, "mrope_section": [24, 20, 20]}),
    ],
    ids=["qwen2", "qwen2_old_name", "qwen2_yarn", "qwen2_dynamic", "qwen3", "qwen3_clipped", "qwen3_yarn"],
)
def test_mrope_equals_qwen(classes: Any, parameters: dict[str, Any]) -> None:
    config_class, rotary_class, layout = classes
    config = config_class(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": 1e6, **parameters},
    )
    rope = described(config, layout)
    random = np.random.default_rng(0)
    for high in (ORIGINAL // 2, ORIGINAL, 2 * ORIGINAL):
        positions = random.integers(0, high, (3, 50))
        reference = rotary_class(config)(torch.zeros(1), torch.tensor(positions)[:, None])
        assert_equal_rows(rope_tables(rope, positions), reference, positions)
        text = positions[0]
        equal_axes = rope_tables(rope, np.stack([text] * 3))
        np.testing.assert_array_equal(rope_tables(rope, text), equal_axes)
        np.testing.assert_array_equal(rope_tables(replace(rope, sections=()), text), equal_axes)


@pytest.mark.parametrize("sections", [(), (2, 1, 1)])
def test_positions_of_a_wrong_shape(sections: tuple[int, ...]) -> None:
    rope = RopeSpec(1e4, 8, sections=sections)
    for shape in [(2, 5), (), (1, 5), (3, 2, 5)] + ([] if sections else [(3, 5)]):
        with pytest.raises(ValueError, match="positions"):
            rope_tables(rope, np.zeros(shape, np.int64))


def test_no_positions() -> None:
    assert rope_tables(RopeSpec(1e4, 8, "dynamic", 2.0, original_max_positions=4), np.arange(0))[0].shape == (0, 4)


DYNAMIC = RopeSpec(1e4, 16, "dynamic", 2.0, original_max_positions=16)
MROPE = RopeSpec(1e4, 16, sections=(2, 3, 3))
pieces = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([DYNAMIC, MROPE]), st.lists(pieces, min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_table_holds_the_rows_of_each_step(rope: RopeSpec, sequences: list[list[tuple[int, bool]]], seed: int) -> None:
    """Whatever sequences came before, the new tokens' rows are those of their positions and the length."""
    random, table = np.random.default_rng(seed), RotaryTable(rope, 80)
    for sequence in sequences:
        past = 0
        for tokens, given_positions in sequence:
            shape = (3, tokens) if rope.sections else (tokens,)
            positions = random.integers(0, 99, shape) if given_positions else None
            table.place(past, tokens, positions)
            expected = rope_tables(rope, np.arange(past, past + tokens) if positions is None else positions)
            rows = slice(past, past + tokens)
            np.testing.assert_array_equal((table.cos[rows], table.sin[rows]), expected)
            past += tokens


def test_only_what_changes_is_written() -> None:
    table = RotaryTable(RopeSpec(1e4, 16, "yarn", 2.0, original_max_positions=16), 32)
    assert not table.place(0, 20)
    assert table.place(20, 1, np.array([3]))
    assert table.place(20, 1)
    assert RotaryTable(DYNAMIC, 32).place(0, 2)


def test_a_prompt_in_chunks_has_the_rows_of_a_whole_one() -> None:
    table = RotaryTable(DYNAMIC, 40)
    for start in range(0, 40, 8):
        table.place(start, 8, length=40)
    np.testing.assert_array_equal((table.cos, table.sin), rope_tables(DYNAMIC, np.arange(40)))
