"""Operators of a call: every event is in one of them, and the groups lose nothing."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, ContextError
from mllm_edge.runtime.onnx_file.cost import read_graph
from mllm_edge.runtime.profiling import operators as module
from mllm_edge.runtime.profiling.operators import Operator, by_kind, by_layer, profile_operators, top
from mllm_edge.spec import is_cross
from tests.families.row import families_of

NEW_TOKENS = 5
IMAGES = [np.full((70, 90, 3), 99, np.uint8)] * 2


class Profiled(NamedTuple):
    bundle: Path
    operators: tuple[Operator, ...]
    events: dict[str, list[dict[str, Any]]]
    """By component, of both calls."""


@pytest.fixture(scope="module", params=families_of(""))
def profiled(request: pytest.FixtureRequest, fours: Callable[[str], Path]) -> Profiled:
    """Each family with 4-bit weights, asked about two images, or as many as it takes."""
    bundle = fours(request.param)
    image = Bundle.load(bundle).manifest.model.image
    assert image is not None
    events: dict[str, list[dict[str, Any]]] = {}
    parse = module._events
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_events", lambda *args: events.setdefault(args[1].partition(".")[0], parse(*args)))
        operators = profile_operators(bundle, "What?", IMAGES[: image.most_images], new_tokens=NEW_TOKENS, threads=1)
    return Profiled(bundle, operators, events)


def shown(bundle: Path) -> list[str]:
    """The stages that images go through."""
    return [stage.component for stage in Bundle.load(bundle).manifest.model.stages if stage.is_for("image")]


def _seconds(events: list[dict[str, Any]], start: int, stop: int | None = None) -> float:
    """Of the nodes in runs `start` to `stop`, told apart by the time at which the runs begin and end."""
    runs = [e for e in events if e["name"] == "model_run"][start:stop]
    nodes = [e for e in events if e["name"] != "model_run"]
    inside = (sum(e["dur"] for e in nodes if run["ts"] <= e["ts"] <= run["ts"] + run["dur"]) for run in runs)
    return sum(inside) / 1e6


def _total(operators: tuple[Operator, ...], stage: str) -> float:
    return sum(o.seconds for o in operators if o.stage == stage)


def test_the_operators_are_the_events_of_the_second_call(profiled: Profiled) -> None:
    bundle, operators, events = profiled
    runs = {name: sum(e["name"] == "model_run" for e in listed) for name, listed in events.items()}
    for component in shown(bundle):
        assert runs[component] % 2 == 0
        expected = _seconds(events[component], runs[component] // 2)
        assert _total(operators, component) == pytest.approx(expected)
    # The first call takes one step, the second four; each has one run before them.
    assert runs["decoder"] == 1 + 1 + 1 + NEW_TOKENS - 1
    assert _total(operators, "prefill") == pytest.approx(_seconds(events["decoder"], 2, 3))
    assert _total(operators, "decode") == pytest.approx(_seconds(events["decoder"], 3))


@pytest.mark.parametrize("group", [by_kind, by_layer])
def test_groups_lose_nothing(profiled: Profiled, group: Any) -> None:
    operators, groups = profiled.operators, group(profiled.operators)
    assert 0 < len(groups) < len(operators)
    for stage in (*shown(profiled.bundle), "prefill", "decode"):
        alone, together = ([o for o in found if o.stage == stage] for found in (operators, groups))
        assert sum(o.calls for o in together) == sum(o.calls for o in alone)
        assert sum(o.seconds for o in together) == pytest.approx(sum(o.seconds for o in alone))
        for found in (alone, together):
            assert sum(o.share for o in found) == pytest.approx(1.0)
            assert [o.seconds for o in found] == sorted((o.seconds for o in found), reverse=True)


def test_calls(profiled: Profiled) -> None:
    calls = {stage: {o.calls for o in profiled.operators if o.stage == stage} for stage in ("prefill", "decode")}
    assert calls == {"prefill": {1}, "decode": {NEW_TOKENS - 1}}


# What images go through in families whose towers have no layers.
WITHOUT_LAYERS = {
    "chameleon": {"Conv", "InstanceNormalization"},
    "emu3": {"Conv", "InstanceNormalization", "MultiHeadAttention"},
    "fuyu": {"DynamicQuantizeMatMul"},
}


def without_layers(profiled: Profiled) -> set[str] | None:
    return WITHOUT_LAYERS.get(Bundle.load(profiled.bundle).manifest.model.family)


def test_kinds_by_stage(profiled: Profiled) -> None:
    groups = by_kind(profiled.operators)
    kinds = {stage: {o.kind for o in groups if o.stage == stage} for stage in {o.stage for o in groups}}
    assert kinds["prefill"] >= {"MatMulNBits", "GroupQueryAttention"}
    assert kinds["decode"] >= {"MatMulNBits", "GroupQueryAttention"}
    if (own := without_layers(profiled)) is not None:
        assert own <= kinds["vision_encoder"]
    else:
        assert "MultiHeadAttention" in kinds["vision_encoder"]
        assert {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"} & kinds["vision_encoder"]
    assert "GroupQueryAttention" not in kinds["vision_encoder"]
    assert all((o.layer, o.name) == (None, "") for o in groups)


def test_layers(profiled: Profiled) -> None:
    groups = by_layer(profiled.operators)
    bundle = Bundle.load(profiled.bundle)
    crossing = sum(is_cross(tensor.name) for tensor in bundle.variant("decoder", "cpu").inputs) // 2
    model = bundle.manifest.model
    # The layers that read a text encoder's prompt have attention of both kinds.
    decoder = sum(len(spec.layers) for spec in model.state) + (0 if model.text_encoder is not None else crossing)
    for stage in ("prefill", "decode"):
        assert {o.layer for o in groups if o.stage == stage} == {None, *range(decoder)}
    tower = {o.layer for o in groups if o.stage == "vision_encoder"}
    if without_layers(profiled) is not None:
        assert tower == {None}
        return
    assert tower == {None, *range(max(layer for layer in tower if layer is not None) + 1)}
    assert len(tower) >= 3
    assert all((o.kind, o.name) == ("", "") for o in groups)


def test_nodes_without_a_layer_in_their_names_take_that_of_their_neighbours() -> None:
    names = ["embed", "layers.0.a", "node_gelu", "layers.0.b", "node_norm", "blocks.1.a", "encoder.layer.1", "lm_head"]
    events = [{"name": f"{name}_kernel_time", "args": {"node_index": str(i)}} for i, name in enumerate(names)]
    assert list(module._layers(events * 2).values()) == [None, 0, 0, 0, None, 1, 1, None]


def test_top_is_of_each_stage(profiled: Profiled) -> None:
    longest, bundle = top(profiled.operators, 2), Bundle.load(profiled.bundle)
    expected = dict.fromkeys([*shown(profiled.bundle), "prefill", "decode"], 2)
    for stage in shown(profiled.bundle):
        graph = read_graph(bundle.listed(bundle.variant(stage, "cpu").file))
        expected[stage] = min(2, len(graph.nodes))  # one linear layer is one
    assert Counter(o.stage for o in longest) == expected
    for operator in longest:
        better = [o for o in profiled.operators if o.stage == operator.stage and o.seconds > operator.seconds]
        assert len(better) < 2


def test_without_images_and_steps(tiny_bundle: Path) -> None:
    assert {o.stage for o in profile_operators(tiny_bundle, "Hi", new_tokens=1, threads=1)} == {"prefill"}


def test_no_file_stays(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny_bundle.iterdir())
    assert profile_operators(tiny_bundle, "Hi", new_tokens=2, threads=1)
    with pytest.raises(ContextError):
        profile_operators(tiny_bundle, "Hi" * 5000, new_tokens=2, threads=1)
    assert list(tmp_path.iterdir()) == []
    assert sorted(tiny_bundle.iterdir()) == before


def test_more_events_than_the_profiler_holds(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVENTS", 10)
    with pytest.raises(BackendError, match="the 10 events of a profile"):
        profile_operators(tiny_bundle, "Hi", new_tokens=2, threads=1)
