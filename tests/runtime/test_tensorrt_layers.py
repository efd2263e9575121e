"""Operators by TensorRT's layer profiler, on a stand-in that takes a microsecond more for each node of a graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.runtime.backends.tensorrt import TensorRT
from mllm_edge.runtime.backends.tensorrt_layers import LayerTimes, layer_kind
from mllm_edge.runtime.profiling import files
from mllm_edge.runtime.profiling import operators as module
from mllm_edge.runtime.profiling.measure import profile
from mllm_edge.runtime.profiling.operators import by_kind, by_layer, profile_operators
from mllm_edge.runtime.vlm import VLM
from tests.runtime.tensorrt_stand_in import StandIn
from tests.runtime.test_profile import check_schema

IMAGES = [np.full((70, 90, 3), 99, np.uint8)] * 2
NEW_TOKENS = 5


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-10.3"])
def test_every_layer_of_the_second_call_is_told(machine: StandIn, bundle: Path, target: str) -> None:
    found = profile_operators(bundle, "What?", IMAGES, new_tokens=NEW_TOKENS, target=target)
    assert machine.counts["records"] == machine.counts["replays"] == 0
    opened = Bundle.load(bundle)
    stages = {"vision_encoder": "vision_encoder", "connector": "connector", "prefill": "decoder", "decode": "decoder"}
    assert {o.stage for o in found} == set(stages)
    for stage, component in stages.items():
        nodes = onnx.load(opened.listed(opened.variant(component, target).file), load_external_data=False).graph.node
        mine = [o for o in found if o.stage == stage]
        added = {"TopK of logits": "TopK", "Sum of logits": "Sum"} if component == "decoder" else {}
        assert {o.name: o.kind for o in mine} == {node.name: node.op_type for node in nodes} | added
        (calls,) = {o.calls for o in mine}
        if component == "decoder":
            assert calls == {"prefill": 1, "decode": NEW_TOKENS - 1}[stage]
        for i, node in enumerate(nodes):
            assert next(o for o in mine if o.name == node.name).seconds == pytest.approx(calls * (i + 1) / 1e6)
        assert sum(o.share for o in mine) == pytest.approx(1)
    kinds = {stage: {o.kind for o in by_kind(found) if o.stage == stage} for stage in stages}
    assert "MatMul" in kinds["decode"]
    layers = {stage: {o.layer for o in by_layer(found) if o.stage == stage} for stage in stages}
    decoder = len(opened.manifest.model.state[0].layers)
    assert layers["prefill"] == layers["decode"] == {None, *range(decoder)}


def test_a_profile_has_them(machine: StandIn, bundle: Path) -> None:
    options: dict[str, Any] = {"backend": "tensorrt", "notice": lambda text: None}
    result = profile(bundle, "Hi", new_tokens=3, warmup=0, iterations=1, operators=True, **options)
    assert result.operators is not None
    assert {o.stage for o in result.operators} == {"vision_encoder", "connector", "prefill", "decode"}
    assert machine.counts["builds"] == 3, "the engines of the profile are used again"
    check_schema(result.as_dict(), files.schema(), files.schema())


def test_a_component_on_the_processor_is_not_among_them(machine: StandIn, bundle: Path) -> None:
    machine.refuse["connector.tensorrt.onnx"] = "no kernel for this layer"
    found = profile_operators(bundle, "What?", IMAGES, new_tokens=2, target="tensorrt")
    assert {o.stage for o in found} == {"vision_encoder", "prefill", "decode"}


def test_runs_are_told_by_graph(machine: StandIn, bundle: Path) -> None:
    times: LayerTimes = {}
    with VLM(Bundle.load(bundle), TensorRT(layers=times), notice=lambda text: None) as vlm:
        vlm.generate("Hi", max_new_tokens=4, ignore_eos=True)
        opened = {name: vlm.bundle.variant(name, "tensorrt").file for name in vlm.bundle.manifest.components}
    assert {name: [len(runs) for runs in times[file]] for name, file in opened.items()} == {
        "vision_encoder": [0],
        "connector": [0],
        "decoder": [4],
    }


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("layers.0.q", "MatMul"),
        ("layers.0.q + layers.0.act", "MatMul + Gelu"),
        ("layers.0.q + (Unnamed Layer* 5) [Constant]", "MatMul"),
        ("__myl_FcMulAdd_myl0_12", "FcMulAdd"),
        ("{ForeignNode[layers.0.q...layers.1.q]}", "ForeignNode"),
        ("Reformatting CopyNode for Input Tensor 0 to layers.0.q", "Reformatting"),
        ("[HostToDeviceCopy 1]", "HostToDeviceCopy"),
        ("17", "17"),
    ],
)
def test_kinds(layer: str, kind: str) -> None:
    assert layer_kind(layer, {"layers.0.q": "MatMul", "layers.0.act": "Gelu"}) == kind


def test_layers_of_names_that_tensorrt_made(tmp_path: Path) -> None:
    names = ["embed", "layers.0.a + layers.0.b", "__myl_Fc_myl0_1", "Reformatting CopyNode to layers.0.c"]
    names += ["{ForeignNode[layers.1.a...layers.2.b]}", "PWN(/model/layers.3/b)", "lm_head"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "empty.onnx")
    events = list(module._layer_events([[[(name, 1e-6) for name in names]]], tmp_path / "empty.onnx"))
    assert list(module._layers(events).values()) == [None, 0, 0, 0, None, 3, None]
