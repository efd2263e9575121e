"""Inputs in 8 bits with a scale for each token: forms, factors, and what a massive token costs the others."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mllm_edge.calibration.decide import Decision
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.linears import find_groups, find_layers
from mllm_edge.calibration.methods.balance import balancing
from mllm_edge.calibration.recipes import CALIBRATED, read_recipe
from mllm_edge.calibration.requantize import requantize
from mllm_edge.calibration.statistics import InputStatistics
from mllm_edge.graph.builder import GraphBuilder, save_model
from mllm_edge.graph.datafile import DataFile
from mllm_edge.graph.gate import check_graph
from mllm_edge.graph.linear import Linear, linear
from mllm_edge.graph.precision import FLOAT32, INT8_STATIC, INT8_TOKEN, Precision

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
ROWS, ROW = 24, 96
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(ROWS, ROW)).astype(np.float32)
BIAS = RANDOM.normal(size=ROWS).astype(np.float32)
TOKENS = RANDOM.normal(size=(2, 5, ROW)).astype(np.float32)


def run(folder: Path, precision: Precision, kind: ir.DataType, contrib: bool, x: np.ndarray, bias: bool) -> np.ndarray:
    """A layer alone, on ONNX Runtime."""
    with DataFile(folder / "g.onnx.data") as data:
        graph = GraphBuilder("g", 17, data, contrib=contrib, float_type=kind)
        given = graph.input("x", kind, ("b", "s", ROW))
        layer = Linear("layer", WEIGHT.shape, lambda: WEIGHT, (lambda: BIAS) if bias else None)
        graph.output(linear(graph, given, layer, precision), "y", kind, ("b", "s", ROWS))
        model = graph.model()
    if kind == HALF:
        model.graph.opset_imports[""] = 19  # QuantizeLinear of half precision
    save_model(model, folder / "g.onnx")
    if not contrib:
        check_graph(model, "opset17")
    (y,) = ort.InferenceSession(folder / "g.onnx").run(None, {"x": x.astype(kind.numpy())})
    return np.asarray(y, np.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "contrib"), [(FLOAT, True), (FLOAT, False), (HALF, False)])
def test_every_token_is_as_exact_as_alone(tmp_path: Path, kind: ir.DataType, contrib: bool, bias: bool) -> None:
    """Whatever the others are: 2% at most for rows between 1e-2 and 1e3."""
    sizes = np.geomspace(1e-2, 1e3, 10, dtype=np.float32).reshape(2, 5, 1)
    offset = BIAS if bias else np.zeros(ROWS, np.float32)
    found = run(tmp_path, INT8_TOKEN, kind, contrib, TOKENS * sizes, bias)
    expected = (TOKENS * sizes) @ WEIGHT.T + offset
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() < 0.02


@pytest.mark.parametrize(("kind", "contrib"), [(FLOAT, True), (FLOAT, False), (HALF, False)])
def test_a_token_of_zeros_gives_the_bias(tmp_path: Path, kind: ir.DataType, contrib: bool) -> None:
    x = TOKENS.copy()
    x[0, 2] = 0
    found = run(tmp_path, INT8_TOKEN, kind, contrib, x, True)
    np.testing.assert_array_equal(found[0, 2], BIAS.astype(kind.numpy()).astype(np.float32))
    assert np.isfinite(found).all()


def test_blocks_take_inputs_as_they_are_on_the_cpu(tmp_path: Path) -> None:
    precision = Precision("w4a8", 4, ranges="token")
    plain = run(tmp_path, Precision("blocks", 4), FLOAT, True, TOKENS, False)
    np.testing.assert_array_equal(run(tmp_path, precision, FLOAT, True, TOKENS, False), plain)


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    """gate and up on one input, float."""
    with DataFile(tmp_path / "float.data") as data:
        graph = GraphBuilder("g", 17, data, contrib=True)
        x = graph.input("x", FLOAT, ("b", "s", ROW))
        for name in ("gate", "up"):
            layer = Linear(name, WEIGHT.shape, lambda: WEIGHT)
            graph.output(linear(graph, x, layer, FLOAT32), f"y.{name}", FLOAT, ("b", "s", ROWS))
        return graph.model()


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_layers_share_the_rounded_input(tmp_path: Path, model: ir.Model, method: str) -> None:
    """One QuantizeLinear and one ReduceMax; rounding to nearest wants no findings at all."""
    precision = Precision("int8_static", 8, method=method, ranges="token")  # type: ignore[arg-type]
    assert precision.needs_data == (method != "rtn")
    findings = Findings(tmp_path / "layers")
    if method != "rtn":
        decide(model, precision, findings, TOKENS)
    with DataFile(tmp_path / "g.onnx.data") as data:
        quantized = requantize(model, "contrib", lambda name: precision, findings, data)
    kinds = [node.op_type for node in quantized.graph]
    assert (kinds.count("ReduceMax"), kinds.count("QuantizeLinear"), kinds.count("MatMulIntegerToFloat")) == (1, 1, 2)
    assert quantized.graph.opset_imports[""] >= 18
    save_model(quantized, tmp_path / "g.onnx")
    expected = TOKENS @ WEIGHT.T
    for y in ort.InferenceSession(tmp_path / "g.onnx").run(None, {"x": TOKENS}):
        assert np.linalg.norm(y - expected) < 0.015 * np.linalg.norm(expected)


def decide(model: ir.Model, precision: Precision, findings: Findings, x: np.ndarray) -> None:
    (group,) = find_groups(find_layers(model.graph))
    statistics = InputStatistics(ROW)
    statistics.add(x)
    Decision(group, statistics, lambda name: precision, {}, findings).make()


def test_a_massive_token_spoils_itself_alone(tmp_path: Path, model: ir.Model) -> None:
    """The usual tokens' error, where a range over all of them would leave two levels for each."""
    x = np.concatenate([RANDOM.normal(size=(400, ROW)), 60 * RANDOM.normal(size=(2, ROW))]).astype(np.float32)
    errors = {}
    for name, precision in (("token", INT8_TOKEN), ("static", INT8_STATIC)):
        findings = Findings(tmp_path / name)
        decide(model, precision, findings, x)
        layer = findings.layer("up")
        assert layer is not None
        assert (layer.input_range is None) == (name == "token")
        errors[name] = layer.error
    assert errors["token"] < 0.015
    assert errors["static"] > 2 * errors["token"]


def test_factors_balance_inputs_and_weights() -> None:
    """Columns that were rescaled come back to where both errors are even, whatever single tokens have."""
    columns = np.exp(RANDOM.normal(size=ROW)).astype(np.float32)
    rows = RANDOM.normal(size=(2000, ROW)).astype(np.float32)
    even = RANDOM.uniform(0.5, 1, (400, ROW)).astype(np.float32)
    factors = balancing([even / columns], rows * columns)
    np.testing.assert_allclose(np.log(factors), np.log(columns) - np.log(columns).mean(), atol=0.25)
    unused = rows * columns
    unused[:, 3] = 0
    assert balancing([even], unused)[3] == 1
    assert (balancing([even], np.zeros_like(rows)) == 1).all()


def test_the_calibrated_decoder_has_a_scale_for_each_token(tmp_path: Path) -> None:
    recipe = CALIBRATED["int8"]
    assert recipe.decoder.per_token
    assert not recipe.decoder.is_static
    assert recipe.vision.is_static
    path = tmp_path / "r.toml"
    path.write_text('base = "int8"\n[vision]\nranges = "token"\n[decoder]\nranges = "percentile"\n', encoding="utf-8")
    changed = read_recipe(path)
    assert changed.vision.per_token
    assert changed.decoder.is_static
    path.write_text('base = "int4"\n[decoder]\nkind = "int8"\n', encoding="utf-8")
    assert read_recipe(path).decoder == recipe.decoder
