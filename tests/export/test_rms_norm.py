"""RMS norms of vision towers: the same numbers in every dialect, and half precision that does not overflow."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import save_file
from torch import nn

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.trace import lower, trace
from mllm_edge.export.vision.modules import RmsNorm
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.datafile import DataFile
from mllm_edge.spec import Stage, TensorSpec

SIZE, EPS = 24, 1e-2
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Dialect and the type of hidden states: the CPU's are float32.
FORMS = [("contrib", FLOAT), ("opset24", FLOAT), ("opset24", HALF), ("opset17", FLOAT), ("opset17", HALF)]


def _module() -> nn.Module:
    return RmsNorm(SIZE, EPS)


@pytest.mark.parametrize("scale", [0.05, 3.0, 1000.0])
@pytest.mark.parametrize(("dialect", "kind"), FORMS, ids=str)
def test_every_dialect_normalizes_alike(tmp_path: Path, dialect: str, kind: ir.DataType, scale: float) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal(SIZE).astype(np.float32)
    save_file({"norm.weight": weight}, tmp_path / "model.safetensors")
    x, y = (TensorSpec(name, "float32", ("tiles", 3, SIZE)) for name in "xy")
    component = TracedComponent(Stage("norm", "vision", "slice"), _module, (x,), (y,), "norm.")
    traced, weights = trace(component, kind), open_weights(tmp_path)
    with DataFile(tmp_path / "norm.onnx.data") as data:
        model = lower(component, traced, weights, RECIPES["fp32"].vision, data, dialect, kind)
    save_model(model, tmp_path / "norm.onnx")
    session = ort.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    hidden = (scale * random.standard_normal((5, 3, SIZE))).astype(kind.numpy())
    (actual,) = session.run(None, {"x": hidden})
    wide = hidden.astype(np.float64)
    expected = weight * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(actual, expected, rtol=2e-3 if actual.dtype == np.float16 else 1e-5, atol=1e-5)
