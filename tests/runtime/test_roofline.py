"""The machine's limits and what stages reach of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.runtime.onnx_file.cost import graph_cost, read_graph
from mllm_edge.runtime.profiling import roofline as module
from mllm_edge.runtime.profiling.roofline import (
    MachineLimits,
    Workload,
    limits_file,
    machine_limits,
    product_graph,
    roofline,
)
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.spec import Variant

WORK = Workload(prompt_tokens=40, new_tokens=20, images=tuple(Layout(1, 1, 1, 1, 9, "", None) for _ in range(2)))
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
    (state,) = bundle.manifest.model.state
    layers, (heads_of_keys, head_dim) = len(state.layers), state.shape
    token = 2 * 4 * layers * heads_of_keys * head_dim
    weights = graph_cost(read_graph(tiny_bundle / "decoder.onnx"), {}, 1, 0).weight_bytes
    assert decode.bytes == weights + 50 * token  # in the middle of the 20 new ones
    assert prefill.bytes == weights + 40 * token
    # Every weight of a matrix is used once; attention looks at 50 tokens.
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    matrices = sum(int(np.prod(i.dims)) for i in graph.initializer if len(i.dims) == 2)
    heads = next(a.i for n in graph.node for a in n.attribute if a.name == "num_heads")
    assert decode.flops == 2 * matrices + layers * 4 * heads * head_dim * 50


MEMORY, ARITHMETIC = MachineLimits(1.0, {"float32": 1e30}), MachineLimits(1e30, {"float32": 1.0})


@pytest.mark.parametrize(
    ("stage", "limits", "share", "precision", "words"),
    [
        ("decode", MEMORY, 0.9, "float32", "near the limit of reading float32 weights: quantize"),
        ("decode", MEMORY, 0.6, "int8_blocks", "within reach of the limit of reading int8_blocks weights: quantize"),
        ("decode", MEMORY, 0.9, "int4_blocks", "stop"),
        ("decode", ARITHMETIC, 0.9, "float32", "stop"),
        ("prefill", ARITHMETIC, 0.9, "float32", "shorten the prompt"),
        ("vision_encoder", ARITHMETIC, 0.9, "float32", "shrink the image or send fewer tiles, or quantize to int8"),
        ("vision_encoder", ARITHMETIC, 0.9, "int8_dynamic", "send fewer tiles"),
        ("vision_encoder", ARITHMETIC, 0.1, "int8_dynamic", "far from the limit"),
    ],
)
def test_advice(tiny_bundle: Path, stage: str, limits: MachineLimits, share: float, precision: str, words: str) -> None:
    bundle = Bundle.load(tiny_bundle)
    forms = {name: replace(variant, precision=precision) for name, variant in variants(bundle).items()}
    (once,) = roofline(bundle, forms, {stage: 1.0}, WORK, limits)
    (roof,) = roofline(bundle, forms, {stage: once.percent_of_limit / 100 / share}, WORK, limits)
    assert roof.percent_of_limit == pytest.approx(100 * share)
    assert words in roof.advice
    assert ("quantize" in roof.advice) == ("quantize" in words)


def test_what_a_tower_of_tiles_computes(tiny_bundle: Path) -> None:
    # Each of two tiles: every matrix once a patch, and attention of all patches with each other.
    bundle = Bundle.load(tiny_bundle)
    (roof,) = roofline(bundle, variants(bundle), {"vision_encoder": 1.0}, WORK, MachineLimits(1e9, {"float32": 1e9}))
    (output,) = bundle.variant("vision_encoder", "cpu").outputs
    patches, width = (int(size) for size in output.shape[1:])
    graph = onnx.load(tiny_bundle / "vision_encoder.onnx", load_external_data=False).graph
    multiplied = {n.input[1] for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv")}
    matrices = sum(int(np.prod(i.dims)) for i in graph.initializer if i.name in multiplied)
    layers = sum(n.op_type == "MultiHeadAttention" for n in graph.node)
    assert layers > 0
    assert roof.flops == 2 * (2 * matrices * patches + layers * 4 * width * patches**2)


def test_an_image_of_cells_is_one_sequence(tmp_path: Path) -> None:
    from mllm_edge.export.pipeline import export
    from tests.tiny import save_tiny_qwen2_vl

    save_tiny_qwen2_vl(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "bundle", recipe_name="fp32")
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.model.image is not None
    assert bundle.manifest.model.image.patches is not None
    limits = MachineLimits(1e9, {"float32": 1e9})
    flops = {}
    for cells, images in ((10, 1), (20, 1), (20, 2)):
        of_each = Layout(1, cells // images, cells // images, 1, cells // images, "", None)
        work = Workload(prompt_tokens=40, new_tokens=4, images=(of_each,) * images)
        (roof,) = roofline(bundle, variants(bundle), {"vision_encoder": 1.0}, work, limits)
        flops[cells, images] = roof.flops
    patches = 10 * bundle.manifest.model.image.patches.merge**2
    graph = onnx.load(tmp_path / "bundle" / "vision_encoder.onnx", load_external_data=False).graph
    layers = sum(n.op_type in ("MultiHeadAttention", "Attention") for n in graph.node)
    (output,) = bundle.variant("vision_encoder", "cpu").outputs
    # Two images cost twice one; as a single larger image, each half also looks at the other.
    assert flops[20, 2] == 2 * flops[10, 1]
    assert flops[20, 1] - flops[20, 2] == layers * 4 * int(output.shape[-1]) * 2 * patches**2
