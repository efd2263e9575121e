"""Models that overflow half precision: operators that would are found, and compute in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.half import KEY
from mllm_edge.calibration.overflow import LIMIT, half_values
from mllm_edge.errors import ExportError, ParityError
from mllm_edge.export import export_job, pipeline
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.vlm import VLM
from tests.export.test_quantize import engine_bytes, samples
from tests.tiny import save_tiny_idefics3

STANDARD = ("tensorrt", "tensorrt-10.3")
PLANTED = 4e4
CAPABILITIES = ["SM80", "SM86", "SM89", "SM120"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels of the vision tower carry opposite, enormous constants, each of which half precision still holds and
    whose sum it does not. The norms behind them take no notice: what they give is as large as before."""
    folder = tmp_path_factory.mktemp("outliers")
    model = save_tiny_idefics3(folder)
    vision = model.model.vision_model
    first, second = vision.encoder.layers
    norms = [first.layer_norm2, second.layer_norm1, second.layer_norm2, vision.post_layernorm]
    before = image_squares(norms, vision)
    with torch.no_grad():
        for bias in (first.self_attn.out_proj.bias, first.mlp.fc2.bias):
            bias[5], bias[6] = PLANTED, -PLANTED
        pass_over(norms, before, image_squares(norms, vision))
    model.save_pretrained(folder)
    return folder


def pass_over(norms: list[Any], before: list[float], now: list[float]) -> None:
    """Let norms ignore the two channels, and give what they gave when mean squares were those `before`."""
    for norm, old, new in zip(norms, before, now, strict=True):
        norm.weight *= (new / old) ** 0.5
        norm.weight[5:7] = 0


def image_squares(norms: list[Any], vision: Any) -> list[float]:
    """Mean squares of what each norm gets, for one image."""
    size = vision.config.image_size
    pixels = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return mean_squares(norms, lambda: vision(pixel_values=pixels))


def mean_squares(norms: list[Any], run: Callable[[], Any]) -> list[float]:
    """Of what each norm gets in a run."""
    seen: list[float] = []
    hooks = [n.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].square().mean()))) for n in norms]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def decoder_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the decoder adds opposite, enormous values to two channels, which the norms behind it take no
    notice of. It has no biases: in half of the MLP's units gate and projection are one, and so its products positive
    whatever the token."""
    folder = tmp_path_factory.mktemp("decoder")
    model = save_tiny_idefics3(folder, text={"tie_word_embeddings": False})
    decoder = model.model.text_model
    first, second = decoder.layers
    norms = [second.input_layernorm, second.post_attention_layernorm, decoder.norm]
    units = first.mlp.down_proj.weight.shape[1] // 2
    with torch.no_grad():
        first.mlp.up_proj.weight[:units] = first.mlp.gate_proj.weight[:units]
        before = token_squares(norms, model)
        first.mlp.down_proj.weight[5:7] = 0
        first.mlp.down_proj.weight[5, :units], first.mlp.down_proj.weight[6, :units] = 3e3, -3e3
        pass_over(norms, before, token_squares(norms, model))
    model.save_pretrained(folder)
    return folder


def token_squares(norms: list[Any], model: Any) -> list[float]:
    """As `mean_squares`, for a few tokens."""
    return mean_squares(norms, lambda: model.model.text_model(input_ids=torch.arange(60, 90)[None]))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("half") / "fp16"
    return export(str(checkpoint), out, targets=STANDARD, recipe_name="fp16"), Bundle.load(out)


def test_half_precision_agrees_with_the_source_where_it_would_overflow(
    exported: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = exported
    for parity in (bundle.manifest.parity, *bundle.manifest.parity["targets"].values()):
        assert all(parity["errors"][name] <= 2e-2 for name in parity["limits"])
    monkeypatch.setattr(pipeline, "keep_in_range", lambda folder, manifest, progress: manifest)
    with pytest.raises(ParityError, match="tensorrt disagree with the source model"):
        export(str(checkpoint), tmp_path / "out", targets=STANDARD, recipe_name="fp16")


def test_report_and_manifest_name_the_operators(exported: Any) -> None:
    report, bundle = exported
    found = bundle.manifest.recipe[KEY]
    assert found == report.float32_operators
    assert set(found) == {f"vision_encoder.{target}.onnx" for target in STANDARD}
    for target in STANDARD:
        operators = found[f"vision_encoder.{target}.onnx"]
        assert min(operators.values()) > LIMIT
        assert 2 * PLANTED * 0.99 < max(operators.values()) < 2 * PLANTED * 1.01
        graph = ir.load(bundle.listed(f"vision_encoder.{target}.onnx")).graph
        names = {node.name for node in graph}
        assert set(operators) < names
        assert not any("q_proj" in name for name in operators)
    bundle.verify()


def test_decoder_agrees_where_it_would_overflow(decoder_checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider keeps float32 between these operators: what they hold is looked at, not its error."""
    report = export(str(decoder_checkpoint), tmp_path / "fp16", targets=STANDARD, recipe_name="fp16")
    bundle = Bundle.load(tmp_path / "fp16")
    for parity in (bundle.manifest.parity, *bundle.manifest.parity["targets"].values()):
        assert all(parity["errors"][name] <= 2e-2 for name in parity["limits"])
    assert set(report.float32_operators) == {f"decoder.{target}.onnx" for target in STANDARD}
    for target in STANDARD:
        operators = report.float32_operators[f"decoder.{target}.onnx"]
        assert max(operators.values()) > 65504
        assert any("layers.0.down_proj" in name for name in operators)
        assert not any("qk_proj" in name for name in operators)
        graph = ir.load(bundle.listed(f"decoder.{target}.onnx")).graph
        half = half_values(graph)
        assert not any(half.intersection(node.outputs) for node in graph if node.name in operators)
        assert engine_bytes(bundle, "decoder", target, CAPABILITIES) > 0


@pytest.mark.parametrize("target", STANDARD)
def test_tensorrt_builds_mixed_graphs(exported: Any, target: str) -> None:
    _, bundle = exported
    for component in ("vision_encoder", "connector", "decoder"):
        assert engine_bytes(bundle, component, target, CAPABILITIES) > 0


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp16"])
def test_quantized_graphs_keep_those_operators_in_float32(exported: Any, recipe: str, tmp_path: Path) -> None:
    _, bundle = exported
    report = quantize(bundle.path, tmp_path / "out", recipe=recipe, data=samples())
    assert max(report.float32_operators["vision_encoder.tensorrt.onnx"].values()) > 65504
    quantized = Bundle.load(tmp_path / "out")
    logits = {target: logits_of(quantized, target) for target in ("cpu", *STANDARD)}
    for target in STANDARD:
        limit = 0.02 if recipe == "fp16" else 0.2
        assert np.abs(logits[target] - logits["cpu"]).max() <= limit * np.ptp(logits["cpu"])


def logits_of(bundle: Bundle, target: str) -> np.ndarray:
    with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
        prompt = vlm.processor.process("Where?", samples()[0]["images"])
        return vlm.steps(vlm.encode(prompt), np.zeros(1, np.int64))[0]


def test_large_models_are_not_looked_through(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only parts of them are compared; whatever comes of that, no file changes behind the manifest."""
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    monkeypatch.setattr(export_job.ExportJob, "_verify", lambda self, folder, scope, cases, allowance: ({}, {}))
    report = export(str(checkpoint), tmp_path / "out", targets=["tensorrt"], recipe_name="fp16")
    assert report.float32_operators == {}
    Bundle.load(tmp_path / "out").verify()


def test_output_beyond_half_precision_is_refused(tmp_path: Path) -> None:
    model = save_tiny_idefics3(tmp_path / "model")
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight *= 30_000
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"connector\.tensorrt\.onnx: image_features reaches .* half precision"):
        export(str(tmp_path / "model"), tmp_path / "out", targets=["tensorrt"], recipe_name="fp16")
    assert not (tmp_path / "out").exists()


def test_models_within_range_stay_in_half(tmp_path: Path) -> None:
    save_tiny_idefics3(tmp_path / "model")
    report = export(str(tmp_path / "model"), tmp_path / "out", targets=["tensorrt"], recipe_name="fp16")
    assert report.float32_operators == {}
    assert KEY not in Bundle.load(tmp_path / "out").manifest.recipe
