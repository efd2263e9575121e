"""Values beyond half precision: found in float32, kept in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mllm_edge.calibration.collect import Feeds
from mllm_edge.calibration.overflow import LIMIT, find_peaks, half_values, in_float32, widen
from mllm_edge.graph.builder import GraphBuilder, save_model, tensor_specs
from mllm_edge.graph.datafile import DataFile
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import Variant

HALF = ir.DataType.FLOAT16
X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float16)


def half_graph(folder: Path, root: bool = False) -> ir.Model:
    """x → · 300 → linear (a weight of 200s) → · 0.0001; with `root` also a NaN, which Where lets through."""
    with DataFile(folder / "g.data") as data:
        graph = GraphBuilder("g", 19, data, HALF)
        x = graph.input("x", HALF, (1, 4))
        large = graph.node("Mul", [x, graph.constant("factor", np.array(300, np.float16))], "large")
        weight = graph.weight("layer.weight", HALF, (4, 4), lambda: np.eye(4, dtype=np.float16) * 200)
        product = graph.node("MatMul", [large, weight], "product")
        summed = graph.node("Add", [product, graph.constant("offset", np.ones(4, np.float16))], "summed")
        result = graph.node("Mul", [summed, graph.constant("small", np.array(1e-4, np.float16))], "result")
        if root:
            bad = graph.node("Sqrt", [x], "root")
            positive = graph.node("Greater", [x, graph.constant("zero", np.array(0, np.float16))], "positive")
            result = graph.node("Where", [positive, bad, result], "either")
        graph.output(result, "y", HALF, (1, 4))
    return graph.model()


def variant(model: ir.Model) -> Variant:
    inputs, outputs = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
    return Variant("tensorrt", "opset17", "float16", "g.onnx", inputs, outputs)


def run(model: ir.Model, path: Path) -> np.ndarray:
    save_model(model, path)
    return OnnxRuntimeCpu().open(path, variant(model)).run({"x": X})["y"]


def peaks_of(model: ir.Model, folder: Path) -> dict[str, float]:
    save_model(model, folder / "g.onnx")
    feeds = Feeds(folder / "feeds")
    feeds.add({"x": X})
    feeds.add({"x": X / 2})
    done: list[Any] = []
    found = find_peaks(
        folder / "g.onnx", variant(model), OnnxRuntimeCpu(), feeds, folder / "pieces", done.append, done.append
    )
    assert done == [2, 1, 1]
    return found


def test_peaks_are_those_of_float32(tmp_path: Path) -> None:
    peaks = peaks_of(half_graph(tmp_path), tmp_path)
    assert set(peaks) == {"large", "product", "summed", "y"}
    assert peaks["large"] == pytest.approx(900)
    assert peaks["product"] == pytest.approx(180_000)
    assert peaks["summed"] == pytest.approx(180_001)


def test_a_value_that_is_no_number_is_found(tmp_path: Path) -> None:
    peaks = peaks_of(half_graph(tmp_path, root=True), tmp_path)
    assert peaks["root"] == float("inf")
    assert np.isfinite(peaks["y"])


def test_operators_around_large_values_compute_in_float32(tmp_path: Path) -> None:
    # ONNX Runtime keeps float32 between the halves of a sequence that it has no kernels for; a device does not.
    with np.errstate(over="ignore"):
        assert not np.isfinite(X * np.float16(60_000)).all()
    model = half_graph(tmp_path)
    assert widen(model, {"product", "summed"}) == ["product", "summed", "result"]
    widened = run(model, tmp_path / "wide.onnx")
    np.testing.assert_allclose(widened, (X.astype(np.float32) * 60_000 + 1) * 1e-4, rtol=2e-3)
    assert widened.dtype == np.float16
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Cast") == 3  # x up, the weight up, y down; none between the three
    half = {value.name for value in half_values(model.graph)}
    assert {"large", "y"} <= half
    assert half.isdisjoint({"product", "summed"})


def test_a_graph_in_float32_holds_nothing_half(tmp_path: Path) -> None:
    model = in_float32(half_graph(tmp_path))
    assert half_values(model.graph) == set()
    assert LIMIT < 65504
