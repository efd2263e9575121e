"""Rounding to nearest: error bounds, exact cases, and the operators that read the codes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.calibration.recipes import RECIPES, recipe
from mllm_edge.graph import chunks
from mllm_edge.graph.builder import GraphBuilder, save_model
from mllm_edge.graph.datafile import DataFile, DryFile
from mllm_edge.graph.linear import Linear, linear, pack_blocks, to_half
from mllm_edge.graph.precision import Precision, block_size
from mllm_edge.graph.rtn import quantize_blocks, quantize_channels


def dequantize(codes: np.ndarray, scales: np.ndarray, bits: int, row: int) -> np.ndarray:
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(codes), -1)[:, :row]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    row=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 1000),
)
def test_error_is_at_most_one_step(rows: int, row: int, bits: int, block: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, row)).astype(np.float32)
    codes, scales = quantize_blocks(weight, bits, block)
    error = np.abs(dequantize(codes, scales, bits, row) - weight)
    steps = np.repeat(np.abs(scales), block, axis=1)[:, :row]
    # Half a step, but for the value opposite to the peak, which the range misses by up to one.
    assert (error <= steps * 1.0001).all()
    assert (error <= steps * 0.5001).mean() > 0.9 or row < 40


@pytest.mark.parametrize("row", [50, 256])
def test_results_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    weight = np.random.default_rng(0).normal(size=(37, row)).astype(np.float16).astype(np.float32)
    calls: list[Callable[[], tuple[np.ndarray, np.ndarray]]] = [
        lambda: quantize_blocks(weight, 4, 32),
        lambda: quantize_blocks(weight, 8, 64, positive_scales=True),
        lambda: quantize_channels(weight),
    ]
    whole = [call() for call in calls]
    monkeypatch.setattr(chunks, "_CHUNK", 5 * row)
    for before, call in zip(whole, calls, strict=True):
        for a, b in zip(before, call(), strict=True):
            assert np.array_equal(a, b)


def test_peak_of_two_equal_magnitudes_is_the_first() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3:5], weight[1, 3:5] = (2.0, -2.0), (-2.0, 2.0)
    _, scales = quantize_blocks(weight, 4, 32)
    assert scales[:, 0].tolist() == [-0.25, 0.25]


def test_extremes_are_exact() -> None:
    weight = np.array([[-8.0, 7.0, 0.0, 1.0] * 8], np.float32)
    codes, scales = quantize_blocks(weight, 4, 32)
    assert np.array_equal(dequantize(codes, scales, 4, 32), weight)


def test_zero_block_stays_zero() -> None:
    codes, scales = quantize_blocks(np.zeros((2, 64), np.float32), 4, 32)
    assert (codes == 8).all()
    assert (scales == 0).all()


def test_channels() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    weight[2] = 0
    codes, scales = quantize_channels(weight)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max() == 127
    assert (np.abs(codes * scales[:, None] - weight) <= scales[:, None] * 0.5001).all()


def test_packing_puts_even_elements_low() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    assert pack_blocks(codes, 4)[0, 0].tolist() == [i | (i + 1) << 4 for i in range(0, 16, 2)]
    assert pack_blocks(codes, 8) is codes


@pytest.mark.parametrize(
    ("row", "largest", "block"), [(512, 128, 128), (192, 128, 64), (96, 128, 32), (512, 64, 64), (50, 128, 32)]
)
def test_block_size(row: int, largest: int, block: int) -> None:
    assert block_size(row, largest) == block


def test_unknown_recipe_lists_the_known() -> None:
    assert recipe("int4") is RECIPES["int4"]
    with pytest.raises(ValueError, match="fp32, fp16, int8, int4"):
        recipe("int3")


def test_half_precision_names_what_overflows() -> None:
    with pytest.raises(OverflowError, match=r"w: magnitude 70000"):
        to_half("w", np.array([70000.0], np.float32))
    with pytest.raises(OverflowError, match="nan"):
        to_half("w", np.array([np.nan], np.float32))


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        (Precision("float32"), 1e-6),
        (Precision("float16", 16), 1e-3),
        (Precision("int8_dynamic", 8), 0.02),
        (Precision("blocks", 8), 0.02),
        (Precision("blocks", 4), 0.15),
    ],
    ids=["float32", "float16", "int8_dynamic", "blocks8", "blocks4"],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("row", [256, 192, 50])
@pytest.mark.parametrize("contrib", [True, False])
def test_every_form_computes_the_layer(
    tmp_path: Path, precision: Precision, tolerance: float, bias: bool, row: int, contrib: bool
) -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=(48, row)).astype(np.float32)
    offset = random.normal(size=48).astype(np.float32)
    x = random.normal(size=(2, 5, row)).astype(np.float32)
    layer = Linear("layer", (48, row), lambda: weight, (lambda: offset) if bias else None)

    def build(sink: DataFile | DryFile) -> ir.Model:
        graph = GraphBuilder("g", 17, sink, contrib=contrib)
        y = linear(graph, graph.input("x", ir.DataType.FLOAT, ("b", "s", row)), layer, precision)
        graph.output(y, "y", ir.DataType.FLOAT, ("b", "s", 48))
        return graph.model()

    path = tmp_path / "g.onnx"
    with DataFile(tmp_path / "g.onnx.data") as data:
        save_model(build(data), path)
    dry = DryFile()
    build(dry)
    assert dry.nbytes > 0
    (y,) = ort.InferenceSession(path).run(None, {"x": x})
    expected = x @ weight.T + (offset if bias else 0)
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < tolerance
