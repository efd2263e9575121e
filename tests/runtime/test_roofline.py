"""The machine's limits and what stages reach of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.runtime import roofline as module
from mllm_edge.runtime.graph_cost import graph_cost, read_graph
from mllm_edge.runtime.roofline import MachineLimits, Workload, limits_file, machine_limits, product_graph, roofline
from mllm_edge.spec import Variant

WORK = Workload(prompt_tokens=40, image_tokens=18, new_tokens=20, tiles=2)
SECONDS = {"preprocess": 1.0, "vision_encoder": 0.5, "connector": 0.25, "prefill": 2.0, "decode": 0.1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-benchmark in milliseconds."""
    for name, value in (("_READ", 1 << 16), ("_SIZE", 16), ("_SECONDS", 0.0)):
        monkeypatch.setattr(module, name, value)


def variants(bundle: Bundle) -> dict[str, Variant]:
    return {name: bundle.variant(name, "cpu") for name in bundle.manifest.components}


@pytest.mark.parametrize(("kind", "dtype"), [("float32", np.float32), ("int8", np.uint8)])
def test_the_graph_of_the_self_benchmark(kind: str, dtype: type) -> None:
    graph = product_graph(kind, 8)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"rows": np.full((8, 8), 3, dtype)})
    assert (product == 24).all()


def test_limits_are_measured_once(small: None, tmp_path: Path) -> None:
    place = tmp_path / "new" / "limits.json"
    first = machine_limits(1, place)
    assert first.measured
    assert first.read_bytes_per_second > 0
    assert set(first.flops_per_second) == {"float32", "int8"}
    again = machine_limits(1, place)
    assert not again.measured
    assert again.flops_per_second == first.flops_per_second
    assert machine_limits(2, place).measured  # other threads, other limits; the first stay
    assert len(json.loads(place.read_text())) == 2
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}'])
def test_a_damaged_cache_is_measured_anew(small: None, tmp_path: Path, content: str) -> None:
    place = tmp_path / "limits.json"
    place.write_text(content)
    assert machine_limits(1, place).measured
    assert not machine_limits(1, place).measured


def test_a_cache_that_cannot_be_written(small: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert machine_limits(1, tmp_path / "file" / "limits.json").measured


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert limits_file() == tmp_path / "mllm-edge" / "limits.json"


def test_percentages_from_stated_limits(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    slow_memory = MachineLimits(1e6, {"float32": 1e15})
    slow_arithmetic = MachineLimits(1e15, {"float32": 1e8})
    for limits, bound in ((slow_memory, "memory"), (slow_arithmetic, "compute")):
        found = {roof.stage: roof for roof in roofline(bundle, variants(bundle), SECONDS, WORK, limits)}
        assert list(found) == ["vision_encoder", "connector", "prefill", "decode"]
        for stage, roof in found.items():
            assert roof.bound == bound
            needed = roof.bytes / 1e6 if bound == "memory" else roof.flops / 1e8
            assert roof.percent_of_limit == pytest.approx(100 * needed / SECONDS[stage])
            assert roof.as_dict()["advice"]


def test_what_a_decode_step_reads_and_computes(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    roofs = roofline(bundle, variants(bundle), SECONDS, WORK, MachineLimits(1e9, {"float32": 1e9}))
    decode, prefill = roofs[-1], roofs[-2]
    cache = bundle.manifest.model.cache
    token = 2 * 4 * cache.layers * cache.heads * cache.head_dim
    weights = graph_cost(read_graph(tiny_bundle / "decoder.onnx"), {}, 1, 0).weight_bytes
    assert decode.bytes == weights + 50 * token  # in the middle of the 20 new ones
    assert prefill.bytes == weights + 40 * token
    # Every weight of a matrix is used once; attention looks at 50 tokens.
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    matrices = sum(int(np.prod(i.dims)) for i in graph.initializer if len(i.dims) == 2)
    heads = next(a.i for n in graph.node for a in n.attribute if a.name == "num_heads")
    assert decode.flops == 2 * matrices + cache.layers * 4 * heads * cache.head_dim * 50


@pytest.mark.parametrize(
    ("limits", "share", "words"),
    [
        (MachineLimits(1.0, {"float32": 1e30}), 0.9, "quantize"),
        (MachineLimits(1e30, {"float32": 1.0}), 0.9, "shrink the image"),
        (MachineLimits(1.0, {"float32": 1e30}), 0.1, "far from the limit"),
    ],
)
def test_advice(tiny_bundle: Path, limits: MachineLimits, share: float, words: str) -> None:
    bundle = Bundle.load(tiny_bundle)
    once = roofline(bundle, variants(bundle), {"prefill": 1.0}, WORK, limits)[0]
    seconds: Mapping[str, float] = {"prefill": once.percent_of_limit / 100 / share}
    roof = roofline(bundle, variants(bundle), seconds, WORK, limits)[0]
    assert roof.percent_of_limit == pytest.approx(100 * share)
    assert words in roof.advice
