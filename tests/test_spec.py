"""The manifest's JSON form: exact round trips, and errors that name the place."""

import json
from typing import Any

import pytest

from mllm_edge.errors import BundleError
from mllm_edge.json_form import from_json, to_json
from mllm_edge.spec import (
    EmbeddingSpec,
    ImagePrompt,
    ImageSpec,
    ModelSpec,
    Normalize,
    PositionSpec,
    Resize,
    ResizeLongestEdge,
    RopeSpec,
    Stage,
    StateSpec,
    TensorSpec,
)

MODEL = ModelSpec(
    family="f",
    model_type="t",
    hidden_size=8,
    vocab_size=9,
    context_length=10,
    parameters=11,
    embedding=EmbeddingSpec("e.npy", 9),
    positions=PositionSpec("rope", (RopeSpec(1e4, 8),)),
    state=(
        StateSpec("growing", (0, 2), (1, 8)),
        StateSpec("growing", (1,), (2, 4)),
        StateSpec("recurrent", (0,), (2, 8)),
    ),
    image=ImageSpec(
        (ResizeLongestEdge(4, "lanczos", 8), Resize(4, 4, "bilinear"), Normalize((0.5,), (0.25,))),
        ImagePrompt("<image>", 3, "{image}"),
        4,
        4,
        4,
    ),
    stages=(Stage("vision_encoder", "vision", "slice"),),
)


def data() -> dict[str, Any]:
    return json.loads(json.dumps(to_json(MODEL)))


def test_round_trip() -> None:
    assert from_json(ModelSpec, data()) == MODEL


def test_integers_are_accepted_where_floats_are_meant() -> None:
    changed = data()
    changed["positions"]["ropes"][0]["theta"] = 10000
    theta = from_json(ModelSpec, changed).positions.ropes[0].theta
    assert theta == 1e4
    assert isinstance(theta, float)


def test_dimensions_are_numbers_or_symbols() -> None:
    spec = TensorSpec("x", "float32", (1, "batch"))
    assert from_json(TensorSpec, json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("hidden_size",), "8", ["manifest.hidden_size", "'8'"]),
        (("hidden_size",), True, ["manifest.hidden_size"]),
        (("hidden_size",), None, ["manifest.hidden_size"]),
        (("embedding", "dtype"), "float8", ["manifest.embedding.dtype", "float8"]),
        (("image", "transforms"), [{"op": "rotate"}], ["manifest.image.transforms[0]", "rotate"]),
        (("image", "transforms"), ["rotate"], ["manifest.image.transforms[0]"]),
        (("image", "transforms"), {}, ["manifest.image.transforms"]),
        (("positions", "ropes", 0, "dim"), 1.5, ["manifest.positions.ropes[0].dim"]),
        (("extra",), 1, ["unknown field 'extra'", "ModelSpec"]),
        (("state", 0), {"kind": "growing", "layers": [0]}, ["manifest.state[0]", "missing field 'shape'"]),
        (("state", 2, "kind"), "kv", ["manifest.state[2].kind", "kv"]),
    ],
)
def test_wrong_values_are_named(path: tuple[Any, ...], value: Any, words: list[str]) -> None:
    changed = data()
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(BundleError) as caught:
        from_json(ModelSpec, changed)
    for word in words:
        assert word in str(caught.value)
