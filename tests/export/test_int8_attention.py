"""Attention in 8-bit products beside ONNX Runtime's own in float32: even, peaked and mixed weights, odd sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mllm_edge.calibration.recipes import CALIBRATED, RECIPES, attention_of, calibrated_recipe
from mllm_edge.errors import RecipeError
from mllm_edge.graph import int8_attention
from mllm_edge.graph.builder import MICROSOFT, GraphBuilder, save_model
from mllm_edge.graph.datafile import DryFile
from mllm_edge.graph.int8_attention import LEAST_KEYS, quantize_attention
from mllm_edge.graph.precision import FLOAT32
from mllm_edge.runtime.onnx_file.cost import graph_cost, read_graph
from mllm_edge.runtime.planning.activations import arena_bytes

FLOAT = ir.DataType.FLOAT
Arrays = tuple[np.ndarray, ...]


def graph_of(heads: int, width: int, rows: int | str, keys: int | str, bias: bool = False) -> GraphBuilder:
    graph = GraphBuilder("attention", 20, DryFile(), contrib=True)
    inputs: list[ir.Value | None] = [
        graph.input(name, FLOAT, ("images", size, width)) for name, size in (("q", rows), ("k", keys), ("v", keys))
    ]
    if bias:
        inputs += [None, None, graph.input("bias", FLOAT, (1, 1, rows, keys))]
    y = graph.node("MultiHeadAttention", inputs, "heads", MICROSOFT, num_heads=heads, scale=(width // heads) ** -0.5)
    graph.output(y, "y", FLOAT, ("images", rows, width))
    return graph


def both(folder: Path, arrays: Arrays, heads: int, symbolic: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What float32 gives for q, k and v, and what 8 bits do."""
    q, k, _ = arrays
    sizes = ("rows", "keys") if symbolic else (q.shape[1], k.shape[1])
    results = []
    for int8 in (False, True):
        model = graph_of(heads, q.shape[-1], *sizes).model()
        if int8:
            assert quantize_attention(model.graph, DryFile()) == 1
            assert not any(node.op_type == "MultiHeadAttention" for node in model.graph)
        save_model(model, folder / "model.onnx")
        session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        results.append(session.run(None, dict(zip("qkv", arrays, strict=True)))[0])
    return results[0], results[1]


def normal(*shapes: tuple[int, ...]) -> Arrays:
    random = np.random.default_rng(0)
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def error(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """The root mean square of the difference, relative."""
    expected, found = pair
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def test_thousands_of_keys_seen_evenly(tmp_path: Path) -> None:
    # Each weight is 1/4096: nothing, at a scale of 1/255.
    q, k, v = normal((1, LEAST_KEYS, 64), (1, 4096, 64), (1, 4096, 64))
    expected, found = both(tmp_path, (0 * q, k, v + 0.5), heads=2)
    np.testing.assert_allclose(expected, np.broadcast_to((v + 0.5).mean(axis=1, keepdims=True), q.shape), atol=1e-4)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_many_small_weights_beside_a_large_one(tmp_path: Path) -> None:
    # One key has as much as a thousand others together: each of these is below half a step.
    q, k, v = normal((1, LEAST_KEYS, 32), (1, 1024, 32), (1, 1024, 32))
    q, k = np.ones_like(q), 0.02 * k
    k[:, 7] = np.log(1023) / 32**0.5
    v[:, 7] = 0
    expected, found = both(tmp_path, (q, k, v + 1), heads=1)
    assert 0.9 < expected.mean() < 1.1
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize(("spread", "most"), [(1.0, 0.03), (3.0, 0.04)])
def test_ordinary_weights(tmp_path: Path, spread: float, most: float) -> None:
    q, k, v = normal(*[(2, 300, 96)] * 3)
    assert error(both(tmp_path, (spread * q, k, v), heads=3)) < most


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("rows", [257, 256])
def test_blocks_of_rows_that_do_not_fill_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, symbolic: bool
) -> None:
    monkeypatch.setattr(int8_attention, "_MOST_SCORES", 100 * 300)
    q, k, v = normal((2, rows, 64), (2, 300, 64), (2, 300, 64))
    expected, found = both(tmp_path, (q, k, v), heads=2, symbolic=symbolic)
    assert found.shape == expected.shape
    assert error((expected, found)) < 0.03


@pytest.mark.parametrize(
    ("rows", "keys", "bias"), [(LEAST_KEYS - 1, 400, False), (400, LEAST_KEYS - 1, False), (400, 400, True)]
)
def test_what_stays_in_float(rows: int, keys: int, bias: bool) -> None:
    model = graph_of(2, 64, rows, keys, bias).model()
    assert quantize_attention(model.graph, DryFile()) == 0
    assert [node.op_type for node in model.graph] == ["MultiHeadAttention"]


def test_its_cost_and_memory_are_told(tmp_path: Path) -> None:
    model = graph_of(2, 64, 1024, 1024).model()
    quantize_attention(model.graph, DryFile())
    save_model(model, tmp_path / "model.onnx")
    read = read_graph(tmp_path / "model.onnx")
    assert "Scan" in {node.kind for node in read.nodes}
    # Scores, softmax and codes of one head, beside q, k, v and what comes of them.
    assert arena_bytes(read, [{"images": 1}]) > 9 * 1024**2
    assert not graph_cost(read, {"images": 1}, 1024, 1024**2).flops.get("float32")


def test_which_recipes_ask_for_it(tmp_path: Path) -> None:
    for recipe in (RECIPES["int4"], RECIPES["int8"], CALIBRATED["int4"], CALIBRATED["int8"]):
        assert attention_of(recipe, "vision", "cpu") == "float"
        asked = replace(recipe, attention="int8")
        assert attention_of(asked, "vision", "cpu") == "int8"
        assert attention_of(asked, "connector", "cpu") == "float"
        assert attention_of(asked, "vision", "cuda") == "float"
        assert attention_of(replace(asked, vision=FLOAT32), "vision", "cpu") == "float"
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "int8"\nattention = "int8"')
    assert attention_of(calibrated_recipe(str(mine)), "vision", "cpu") == "int8"
    mine.write_text('attention = "int4"')
    with pytest.raises(RecipeError, match="attention = 'int4'"):
        calibrated_recipe(str(mine))
