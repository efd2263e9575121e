"""What is fitted to few rows must not be worse than rounding on rows that were not seen."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mllm_edge.calibration.decide import Decision
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.linears import Fold, Group, Layer
from mllm_edge.calibration.statistics import InputStatistics
from mllm_edge.graph import rtn
from mllm_edge.graph.precision import Precision

WIDTH, OUT, BLOCK = 128, 48, 32


def layer(weight: np.ndarray) -> Layer:
    x, y = ir.Value(name="x"), ir.Value(name="y")
    stored = ir.Value(name="layer.weight", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="layer.weight"))
    return Layer("layer", weight.shape, x, y, stored, None, ())


def rounded(weight: np.ndarray) -> np.ndarray:
    codes, scales = rtn.quantize_blocks(weight, 4, BLOCK)
    return ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(weight.shape)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("rows", [4, 24, 400])
def test_few_rows_never_cost(method: Any, rows: int, seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((OUT, WIDTH)).astype(np.float32)
    # Other directions in the rows that are fitted than in those held apart; much drift that has no pattern.
    mix = random.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
    fitted, held = (
        random.standard_normal((n, WIDTH)).astype(np.float32) @ m for n, m in zip((rows, 64), mix, strict=True)
    )
    statistics = InputStatistics(WIDTH, with_gram="gptq" in method)
    drifted = [x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in (fitted, held)]
    statistics.add(drifted[0], None, fitted)
    statistics.add(drifted[1], None, held, held=True)
    found = layer(weight)
    group = Group(found.x, (found,), Fold(("norm",), None))
    findings = Findings(tmp_path)
    Decision(group, statistics, lambda name: Precision("blocks", 4, BLOCK, method), {}, findings).make()
    chosen = findings.layer("layer")
    assert chosen is not None
    matrix = chosen.replaced()
    assert matrix is not None

    def error(used: np.ndarray) -> float:
        return float(np.linalg.norm(drifted[1] @ used.T - held @ weight.T) / np.linalg.norm(held @ weight.T))

    assert error(matrix) <= error(rounded(weight)) * 1.0001
    assert chosen.error == pytest.approx(error(matrix), rel=1e-3)
    assert chosen.nearest_error == pytest.approx(error(rounded(weight)), rel=1e-3)


def test_signed_scales_stay_with_targets_that_take_them(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((OUT, WIDTH)).astype(np.float32)
    statistics = InputStatistics(WIDTH, with_gram=True)
    statistics.add(np.zeros((4, WIDTH), np.float32))
    statistics.add(np.ones((4, WIDTH), np.float32), held=True)
    found, findings = layer(weight), Findings(tmp_path)
    Decision(
        Group(found.x, (found,), None), statistics, lambda name: Precision("blocks", 4, BLOCK, "gptq"), {}, findings
    ).make()
    chosen = findings.layer("layer")
    assert chosen is not None
    assert (chosen.quantize_blocks(weight, 4, BLOCK, positive_scales=True)[1] > 0).all()
