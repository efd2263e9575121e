"""Vision modules alone: saved from transformers' with random weights, exported in float32, run by ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.export import export_job
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights, open_weights
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.trace import lower
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.datafile import DataFile
from mllm_edge.spec import Stage, TensorSpec

DIALECTS = ("contrib", "opset24", "opset17")
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
Derived = Mapping[str, Callable[[], np.ndarray]]


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with weights that make every part count: none is zero, not even a bias or a gate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = (parameter.ndim == 1 and "norm" in name and name.endswith("weight")) or "ln_q.weight" in name
            parameter.copy_(1 + 0.2 * noise if one else noise * (0.3 if parameter.ndim < 2 else 0.15))
    return model.eval()


def saved(model: Any, folder: Path) -> Weights:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return open_weights(folder)


def reader(config: Any) -> ConfigReader:
    return ConfigReader("config.json vision_config", config.to_dict(), type(config)().to_dict())


def component(
    name: str,
    module: Callable[[], torch.nn.Module],
    inputs: Sequence[TensorSpec],
    output: TensorSpec,
    prefix: str = "",
    derived: Derived | None = None,
) -> TracedComponent:
    stage = Stage(name, "connector" if name == "connector" else "vision", "image")
    return TracedComponent(stage, module, tuple(inputs), (output,), prefix, derived or {})


def opened(
    part: TracedComponent, weights: Weights, folder: Path, dialect: str, kind: ir.DataType = FLOAT
) -> ort.InferenceSession:
    with DataFile(folder / f"{part.name}.onnx.data") as data:
        # Traced as exports are, of which the tests keep what they traced: once for all dialects.
        model = lower(part, export_job.trace(part, kind), weights, RECIPES["fp32"].vision, data, dialect, kind)
    save_model(model, folder / f"{part.name}.onnx")
    return ort.InferenceSession(folder / f"{part.name}.onnx", providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The only output; float inputs take the graph's type."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    typed = {spec.name: feeds[spec.name].astype(kinds[spec.type]) for spec in session.get_inputs()}
    (found,) = session.run(None, typed)
    return found
