"""Attention of vision modules: a bias, queries of their own, a scale, several dynamic sizes, integer inputs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.trace import lower, trace
from mllm_edge.export.vision.modules import Linear, attention, packed_attention, packed_linear
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.datafile import DataFile
from mllm_edge.spec import Stage, TensorSpec

SIZE, HEADS, ROWS = 32, 2, 11
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
FORMS = [("contrib", FLOAT), ("opset24", FLOAT), ("opset24", HALF), ("opset17", FLOAT), ("opset17", HALF)]


class Resampler(nn.Module):
    """Queries [1, Q, SIZE] look at patches [1, P, SIZE], each with a row of a table that `places` [P] chooses."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.table = nn.Parameter(torch.empty(ROWS, SIZE))
        self.q_proj, self.k_proj, self.v_proj = (Linear(SIZE, SIZE) for _ in range(3))

    def forward(
        self, queries: torch.Tensor, patches: torch.Tensor, places: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        placed = patches + self.table[places]
        query, key, value = self.q_proj(queries), self.k_proj(placed), self.v_proj(placed)
        return attention(query, key, value, HEADS, bias, self.scale)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_attention(packed_linear(x, [self.q_proj, self.k_proj, self.v_proj]), HEADS)


def saved(folder: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"table": (ROWS, SIZE)}
    for part in "qkv":
        shapes |= {f"{part}_proj.weight": (SIZE, SIZE), f"{part}_proj.bias": (SIZE,)}
    tensors = {name: (0.3 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def opened(component: TracedComponent, folder: Path, dialect: str, kind: ir.DataType) -> ort.InferenceSession:
    with DataFile(folder / "x.onnx.data") as data:
        traced, weights = trace(component, kind), open_weights(folder)
        model = lower(component, traced, weights, RECIPES["fp32"].vision, data, dialect, kind)
    save_model(model, folder / "x.onnx")
    return ort.InferenceSession(folder / "x.onnx", providers=["CPUExecutionProvider"])


def projected(tensors: dict[str, np.ndarray], part: str, x: np.ndarray) -> torch.Tensor:
    """[N, S, SIZE] → [N, HEADS, S, SIZE/HEADS]."""
    rows = x @ tensors[f"{part}_proj.weight"].T + tensors[f"{part}_proj.bias"]
    return torch.tensor(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> np.ndarray:
    total = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    return total.transpose(1, 2).flatten(2).numpy()


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("biases", [1, HEADS])
@pytest.mark.parametrize(("dialect", "kind"), FORMS, ids=str)
def test_queries_of_their_own(
    tmp_path: Path, dialect: str, kind: ir.DataType, biases: int, scale: float | None
) -> None:
    tensors, random = saved(tmp_path), np.random.default_rng(1)
    component = TracedComponent(
        Stage("resampler", "connector", "image"),
        lambda: Resampler(scale),
        (
            TensorSpec("queries", "float32", (1, "queries", SIZE)),
            TensorSpec("patches", "float32", (1, "patches", SIZE)),
            TensorSpec("places", "int64", ("patches",)),
            TensorSpec("bias", "float32", (1, biases, "queries", "patches")),
        ),
        (TensorSpec("y", "float32", (1, "queries", SIZE)),),
        "",
    )
    session = opened(component, tmp_path, dialect, kind)
    for queries, patches in ((3, 7), (5, 2)):
        feeds = {
            "queries": random.standard_normal((1, queries, SIZE)),
            "patches": random.standard_normal((1, patches, SIZE)),
            "bias": np.where(random.random((1, biases, queries, patches)) < 0.3, -30000.0, 0.0),
        }
        feeds["bias"][..., 0] = 0  # every query sees something
        feeds = {name: array.astype(kind.numpy()) for name, array in feeds.items()}
        feeds["places"] = random.integers(0, ROWS, patches)
        (found,) = session.run(None, feeds)
        asked, seen, bias = (feeds[name].astype(np.float32) for name in ("queries", "patches", "bias"))
        placed = seen + tensors["table"][feeds["places"]]
        parts = projected(tensors, "q", asked), projected(tensors, "k", placed), projected(tensors, "v", placed)
        wanted = expected(*parts, attn_mask=torch.tensor(bias), scale=scale)
        np.testing.assert_allclose(found, wanted, atol=1e-5 if kind == FLOAT else 2e-2)


@pytest.mark.parametrize(("dialect", "kind"), FORMS, ids=str)
def test_projections_side_by_side(tmp_path: Path, dialect: str, kind: ir.DataType) -> None:
    tensors = saved(tmp_path)
    x, y = (TensorSpec(name, "float32", ("tiles", 6, SIZE)) for name in "xy")
    session = opened(
        TracedComponent(Stage("packed", "vision", "image"), Packed, (x,), (y,), ""), tmp_path, dialect, kind
    )
    rows = np.random.default_rng(2).standard_normal((3, 6, SIZE)).astype(kind.numpy())
    (found,) = session.run(None, {"x": rows})
    wanted = expected(*(projected(tensors, part, rows.astype(np.float32)) for part in "qkv"))
    np.testing.assert_allclose(found, wanted, atol=1e-5 if kind == FLOAT else 2e-2)
