"""Scales of rows of zeros and of tiny values: positive and normal in every form, and what comes out stays zero."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mllm_edge.calibration import int8_cache
from mllm_edge.calibration.findings import LayerFindings
from mllm_edge.calibration.methods import awq, descent, gptq
from mllm_edge.graph import rtn
from mllm_edge.graph.builder import GraphBuilder, save_model
from mllm_edge.graph.datafile import DataFile
from mllm_edge.graph.linear import Linear, linear, quantized_input
from mllm_edge.graph.precision import Precision
from mllm_edge.graph.scales import reciprocal, smallest, storable

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
PRECISIONS = {
    "int8": Precision("int8_dynamic", 8),
    "int8_static": Precision("int8_static", 8),
    "int8_blocks": Precision("blocks", 8),
    "int4": Precision("blocks", 4),
    "int3": Precision("blocks", 3),
    "fp8": Precision("fp8", 8),
    "w4a8": Precision("w4a8", 4),
}
ROWS, ROW = 12, 160


def rows_of_all_sizes() -> np.ndarray:
    """[12, 160]: rows and blocks of zeros, of values that half precision and float32 hold as subnormal numbers."""
    weight = np.random.default_rng(0).normal(size=(ROWS, ROW)).astype(np.float32)
    weight[0] = 0
    weight[1, :128] = 0
    weight[2, 32:] = 0
    weight[3] *= 1e-3
    weight[4] *= 1e-5
    weight[5] *= 1e-8
    weight[6] = 1e-39
    weight[7] = -1e-45
    weight[8, 0], weight[8, 1:] = 1e-6, 0
    return weight


def build(
    folder: Path, precision: Precision, kind: ir.DataType, contrib: bool, weight: np.ndarray, **layer: Any
) -> tuple[Path, ir.Model]:
    """A graph of one layer, on disk and as it was built."""
    with DataFile(folder / "g.onnx.data") as data:
        graph = GraphBuilder("g", 21, data, contrib=contrib, float_type=kind)
        x = graph.input("x", kind, ("n", weight.shape[1]))
        if precision.is_static:
            where = layer.pop("where", (-3.0, 3.0))
            layer |= {"quantized": quantized_input(graph, x, "layer", where, precision.kind == "fp8")}
        y = linear(graph, x, Linear("layer", weight.shape, lambda: weight, **layer), precision)
        graph.output(y, "y", kind, ("n", len(weight)))
        model = graph.model()
    save_model(model, folder / "g.onnx")
    return folder / "g.onnx", ir.load(folder / "g.onnx")


def scales_of(model: ir.Model) -> dict[str, np.ndarray]:
    found = {n: v.const_value for n, v in model.graph.initializers.items() if n.endswith((".scale", ".scales"))}
    return {name: value.numpy() for name, value in found.items() if value is not None}


FORMS = [(kind, contrib) for kind in (FLOAT, HALF, BFLOAT) for contrib in (True, False)]


def exists(name: str, kind: ir.DataType, contrib: bool) -> bool:
    """ONNX Runtime's own operators have no float8 and no bfloat16."""
    return not (contrib and (PRECISIONS[name].kind == "fp8" or kind == BFLOAT))


WRITTEN = [(name, kind, contrib) for name in PRECISIONS for kind, contrib in FORMS if exists(name, kind, contrib)]


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    """TensorRT takes whole blocks only: such a layer, a patch embedding of 14 px, say, has 8 bits there."""
    weight, x = (np.random.default_rng(2).normal(size=(n, 588)).astype(np.float32) for n in (ROWS, 5))
    for contrib, tolerance in ((True, 0.2), (False, 0.02)):
        path, model = build(tmp_path, PRECISIONS["int4"], FLOAT, contrib, weight)
        assert all(node.attributes.get("block_size") is None for node in model.graph) or contrib
        (y,) = ort.InferenceSession(path).run(None, {"x": x})
        assert np.abs(y - x @ weight.T).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize(("name", "kind", "contrib"), WRITTEN)
def test_scales_are_normal_numbers_in_every_form(tmp_path: Path, name: str, kind: ir.DataType, contrib: bool) -> None:
    precision = PRECISIONS[name]
    path, model = build(tmp_path, precision, kind, contrib, rows_of_all_sizes())
    found = scales_of(model)
    assert found
    for scales in found.values():
        magnitude = np.abs(scales.astype(np.float32))
        assert (magnitude >= smallest(scales.dtype)).all()
        assert np.isfinite(magnitude).all()
        if not contrib:
            assert (scales.astype(np.float32) > 0).all()
    if kind != FLOAT or precision.kind == "fp8":
        return
    x = np.random.default_rng(1).normal(size=(5, ROW)).astype(np.float32)
    (y,) = ort.InferenceSession(path).run(None, {"x": x})
    assert np.isfinite(y).all()
    assert np.abs(y[:, 0]).max() < 1e-20
    expected = x @ rows_of_all_sizes().T
    assert np.abs(y - expected).max() <= 0.25 * np.abs(expected).max()
    assert np.abs(y[:, 4:9]).max() < 1e-3


@pytest.mark.parametrize(("kind", "contrib"), FORMS)
def test_a_weight_of_zeros_gives_zeros(tmp_path: Path, kind: ir.DataType, contrib: bool) -> None:
    for name, precision in PRECISIONS.items():
        if not exists(name, kind, contrib):
            continue
        (tmp_path / name).mkdir()
        path, model = build(tmp_path / name, precision, kind, contrib, np.zeros((ROWS, ROW), np.float32))
        assert all((scales.astype(np.float32) > 0).all() for scales in scales_of(model).values())
        if kind == FLOAT and precision.kind != "fp8":
            (y,) = ort.InferenceSession(path).run(None, {"x": np.ones((2, ROW), np.float32)})
            assert np.abs(y).max() < 1e-20


@pytest.mark.parametrize("where", [(0.0, 0.0), (-1e-12, 0.0), (0.0, 1e-6), (-1e-44, 1e-44), (-1e-3, 1e-5)])
@pytest.mark.parametrize(("name", "kind", "contrib"), [w for w in WRITTEN if w[0] in ("int8_static", "fp8")])
def test_ranges_of_inputs_that_are_nearly_nothing(
    tmp_path: Path, name: str, kind: ir.DataType, contrib: bool, where: tuple[float, float]
) -> None:
    weight = np.ones((ROWS, ROW), np.float32)
    path, model = build(tmp_path, PRECISIONS[name], kind, contrib, weight, where=where)
    for scales in scales_of(model).values():
        # Blocks of ONNX Runtime's own operators may have a scale with a sign; Q/DQ may not.
        values = scales.astype(np.float32)
        assert ((np.abs(values) if contrib else values) >= smallest(scales.dtype)).all()
    if kind == FLOAT and name == "int8_static":
        (y,) = ort.InferenceSession(path).run(None, {"x": np.zeros((2, ROW), np.float32)})
        assert (y == 0).all()


def test_rows_that_half_precision_holds_badly_are_rounded_anew() -> None:
    """The best codes for the scale that is stored, not those of another scale."""
    weight = np.random.default_rng(3).uniform(-5e-3, 5e-3, (6, 64)).astype(np.float32)
    codes, scales = rtn.quantize_channels(weight)
    stored, floors = storable(codes, scales, np.dtype(np.float16), exact=lambda: weight)
    assert (floors == np.float32(smallest(np.dtype(np.float16)))).all()
    np.testing.assert_allclose(stored * floors[:, None], weight, rtol=0, atol=0.51 * floors[0])
    again, _ = storable(codes, scales, np.dtype(np.float16))
    np.testing.assert_allclose(again * floors[:, None], weight, rtol=0, atol=1.02 * floors[0])


def test_good_scales_stay_as_they_are() -> None:
    codes, scales = rtn.quantize_channels(np.random.default_rng(4).normal(size=(4, 32)).astype(np.float32))
    same = storable(codes, scales, np.dtype(np.float16))
    assert same[0] is codes
    assert same[1] is scales


def test_signs_of_scales_stay() -> None:
    codes, scales = np.array([[0, 15], [8, 8]], np.uint8), np.array([-1e-6, -0.0], np.float32)
    stored, found = storable(codes, scales, np.dtype(np.float16), zero=8)
    np.testing.assert_array_equal(found, np.array([-1, 1], np.float32) * np.float32(smallest(np.dtype(np.float16))))
    np.testing.assert_array_equal(stored, [[8, 8], [8, 8]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_reciprocals_are_numbers(dtype: Any) -> None:
    values = np.array([0, 1e-45, -1e-39, smallest(np.dtype(dtype)), 2.0], np.float32)
    assert np.isfinite(reciprocal(values)).all()
    assert (reciprocal(values)[:3] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_method_bears_rows_of_all_sizes(bits: int) -> None:
    weight, random = rows_of_all_sizes(), np.random.default_rng(5)
    x = random.normal(size=(64, ROW)).astype(np.float32)
    gram = x.T @ x
    with np.errstate(all="raise", under="ignore"):
        codes, scales = gptq.quantize(weight, gram, bits, 32)
        codes, scales = descent.refine(weight, gram, codes, scales, bits, 2)
        for name, found in {"gptq": scales, "awq": awq.clipped_scales(weight, x, bits, 32)}.items():
            assert np.isfinite(found).all(), name
        rtn.quantize_channels(weight)
        rtn.quantize_fp8(weight)
        rtn.quantize_blocks(weight, bits, 32, positive_scales=True)
    values = codes.reshape(ROWS, -1, 32) * scales[..., None]
    assert np.isfinite(values).all()
    assert (values[0] == 0).all()


def test_calibrated_codes_are_stored_with_good_scales(tmp_path: Path) -> None:
    weight, random = rows_of_all_sizes(), np.random.default_rng(6)
    x = random.normal(size=(64, ROW)).astype(np.float32)
    codes, scales = gptq.quantize(weight, x.T @ x, 4, 32)
    found = LayerFindings("layer", 4, 32, codes, scales, None, None, None, 0.0, 0.0)
    for kind, contrib in FORMS[:4]:
        folder = tmp_path / f"{kind.name}{contrib}"
        folder.mkdir()
        _, model = build(folder, Precision("blocks", 4, 32), kind, contrib, weight, rounding=found)
        for stored in scales_of(model).values():
            assert (np.abs(stored.astype(np.float32)) >= smallest(stored.dtype)).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_channels_of_a_cache_that_hold_nothing(kind: Any) -> None:
    peaks = np.array([[0, 1e-45, 1e-30, 1e-6, 1e-3, 3.0]], np.float32)
    with np.errstate(over="raise", divide="raise"):
        scales = int8_cache._scale(peaks, np.dtype(kind))
        stored, inverse = scales.astype(kind), (1 / scales).astype(kind)
    assert scales[0, 0] == 1
    assert (stored >= smallest(np.dtype(kind))).all()
    assert np.isfinite(inverse).all()
    assert (peaks * inverse <= 127.5).all()
