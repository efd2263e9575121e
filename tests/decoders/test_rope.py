"""From a configuration's rope to RopeSpec: both forms of it, and errors that name the key."""

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.json_form import from_json, to_json
from mllm_edge.spec import RopeSpec

CONTEXT = 4096
LONG: dict[str, Any] = {"short_factor": [1.0, 2], "long_factor": [3.0, 4.0]}
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(values: dict[str, Any], head_dim: int = 8, **options: Any) -> RopeSpec:
    """The rope of a configuration with `values`."""
    reader = ConfigReader("config.json", {"max_position_embeddings": CONTEXT, **values}, {})
    return rope_spec(reader, head_dim, **options)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2}, RopeSpec(5e5, 8, "linear", 2.0)),
        ({"type": "dynamic", "factor": 2}, RopeSpec(5e5, 8, "dynamic", 2.0, original_max_positions=CONTEXT)),
        (
            {**LLAMA3, "original_max_position_embeddings": 1024},
            RopeSpec(5e5, 8, "llama3", 8.0, 1.0, 4.0, original_max_positions=1024),
        ),
        (
            {"type": "yarn", "factor": 1, "beta_fast": 8, "beta_slow": None, "truncate": False},
            RopeSpec(5e5, 8, "yarn", beta_fast=8.0, truncate=False, original_max_positions=CONTEXT),
        ),
    ],
    ids=["linear", "dynamic", "llama3", "yarn"],
)
def test_forms_of_transformers_4_and_5(scaling: dict[str, Any], expected: RopeSpec) -> None:
    assert read({"rope_theta": 5e5, "rope_scaling": scaling}) == expected
    assert read({"rope_parameters": {**scaling, "rope_theta": 5e5}}) == expected
    assert from_json(RopeSpec, to_json(expected)) == expected


def test_absent_rope_is_the_default_one() -> None:
    assert read({}) == RopeSpec(1e4, 8)
    assert read({"rope_scaling": None, "rope_theta": 1e6}) == RopeSpec(1e6, 8)


def test_longrope_with_the_original_length_outside() -> None:
    """As Phi-3 has it, under either name."""
    outside = {"original_max_position_embeddings": 1024}
    for name in ("su", "longrope"):
        rope = read({"rope_scaling": {"type": name, **LONG}, **outside}, head_dim=4)
        assert rope == RopeSpec(
            1e4,
            4,
            "longrope",
            factor=4.0,
            original_max_positions=1024,
            attention_factor=1.2**0.5,  # 1 + ln 4 / ln 1024
            short_factors=(1.0, 2.0),
            long_factors=(3.0, 4.0),
        )
    assert from_json(RopeSpec, to_json(rope)) == rope


def test_partial_share_inside_and_outside() -> None:
    assert read({"partial_rotary_factor": 0.5}, partial=True).dim == 4
    inside = {"rope_type": "default", "partial_rotary_factor": 0.75}
    assert read({"rope_parameters": inside, "partial_rotary_factor": 0.5}, partial=True).dim == 6
    assert read({"partial_rotary_factor": 1.0}).dim == 8


def test_mrope_sections() -> None:
    rope = read({"rope_parameters": MROPE}, mrope="sectioned")
    assert (rope.kind, rope.sections, rope.layout) == ("default", (2, 1, 1), "sectioned")
    assert from_json(RopeSpec, to_json(rope)) == rope
    old = {"type": "mrope", "mrope_section": [2, 1, 1]}
    assert read({"rope_scaling": old}, mrope="interleaved").layout == "interleaved"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "proportional"}, ["'proportional'", "longrope"]),
        ({"rope_type": "linear"}, ["linear lacks factor"]),
        ({"rope_type": "dynamic"}, ["dynamic lacks factor"]),
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9},
            ["original_max_position_embeddings = 9"],
        ),
        (LLAMA3, ["llama3 lacks original_max_position_embeddings"]),
        ({"rope_type": "yarn"}, ["yarn lacks factor"]),
        ({"rope_type": "longrope", "long_factor": [1.0]}, ["longrope lacks short_factor"]),
        ({"rope_type": "longrope", **LONG}, ["short_factor has 2 values, 4 pairs"]),
        ({"rope_type": "longrope", **LONG, "short_mscale": 1.2}, ["short_mscale = 1.2"]),
        ({"rope_type": "default", "beta_fast": 3}, ["default has beta_fast = 3"]),
        ({"full_attention": {"rope_type": "default"}}, ["full_attention"]),
        (MROPE, ["mrope_section = [2, 1, 1]"]),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5", "does not apply"]),
    ],
)
def test_wrong_keys_are_named(parameters: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"rope_parameters": parameters})
    for word in words:
        assert word in str(caught.value)


def test_dynamic_needs_the_context_length() -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        read({"max_position_embeddings": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}})


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"rope_type": "default"}, r"mrope_section = \[\]"),
        ({**MROPE, "mrope_section": [2, 2]}, "three numbers that add up to 4"),
        ({**MROPE, "mrope_section": [2, 2, 1]}, "three numbers that add up to 4"),
        ({**MROPE, "mrope_interleaved": True}, "mrope_interleaved = True"),
    ],
)
def test_wrong_sections(parameters: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read({"rope_parameters": parameters}, mrope="sectioned")


@pytest.mark.parametrize("share", [0.125, 0.4, 0.0, 1.5])
def test_share_that_makes_no_pairs(share: float) -> None:
    with pytest.raises(ConfigError, match=f"partial_rotary_factor = {share}"):
        read({"partial_rotary_factor": share}, partial=True)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Phi3Config])
def test_every_key_of_a_default_configuration_is_read(config_class: Any) -> None:
    values = config_class().to_dict()
    reader = ConfigReader("config.json", values, {"rope_parameters": None, "max_position_embeddings": 0})
    rope_spec(reader, 128)
    reader.finish()
