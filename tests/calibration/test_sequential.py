"""Calibration piece by piece: layers that GPTQ rounds see what the rounded layers before them give."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration import calibrate as calibrate_module
from mllm_edge.calibration.calibrate import calibrate, held_apart, row_weights
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import load_samples
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.linears import find_groups, find_layers
from mllm_edge.calibration.segments import Segment, cut, extract
from mllm_edge.export.pipeline import export
from mllm_edge.graph import rtn
from mllm_edge.graph.precision import FLOAT16, Precision
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from tests.tiny import save_tiny_llava

HEAD = "lm_head"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    save_tiny_llava(folder / "model")
    export(str(folder / "model"), folder / "fp32", recipe_name="fp32", verify_mode="off")
    bundle, random = Bundle.load(folder / "fp32"), np.random.default_rng(0)
    items = [
        {"images": [random.integers(0, 256, (64, 64, 3), dtype=np.uint8)], "prompt": f"Belt {i}?", "answer": "a box"}
        for i in range(6)
    ]
    record(bundle, OnnxRuntimeCpu(), load_samples(items), folder / "feeds")
    return bundle, folder / "feeds"


def calibrated(
    recorded: tuple[Bundle, Path], component: str, precision: Precision, folder: Path, sequential: bool = True
) -> Findings:
    bundle, feeds = recorded
    variant = bundle.variant(component, "cpu")

    def of(layer: str) -> Precision:
        return FLOAT16 if layer == HEAD else precision

    file = bundle.listed(variant.file)
    return calibrate(file, variant, OnnxRuntimeCpu(), Feeds(feeds / component), of, folder, sequential=sequential)


def values(
    recorded: tuple[Bundle, Path],
    component: str,
    names: list[str],
    findings: Findings | None,
    folder: Path,
    fitted: bool = False,
) -> dict[str, np.ndarray]:
    """The values called `names`, rows of all runs [rows, K] or of those that weights are `fitted` to, with the weights
    that were found, if any."""
    bundle, feeds = recorded
    variant = bundle.variant(component, "cpu")
    model = ir.load(bundle.listed(variant.file))
    own = [v.name or "" for v in model.graph.inputs]
    for layer in find_layers(model.graph):
        found = findings.layer(layer.name) if findings else None
        weight = None if found is None else found.replaced()
        if weight is not None:
            layer.weight.const_value = ir.tensor(np.ascontiguousarray(weight.T), name=layer.weight.name)
    part = extract(model, Segment((), (), ()), names, {})
    folder.mkdir(exist_ok=True)
    ir.save(part, folder / "whole.onnx", external_data="whole.onnx.data")
    session = OnnxRuntimeCpu().open(folder / "whole.onnx", variant)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    source = Feeds(feeds / component)
    for i in range(len(source)):
        if fitted and held_apart(i, len(source)):
            continue
        inputs = source.read(i, own)
        outputs = session.run({v.name or "": inputs[v.name or ""] for v in part.graph.inputs})
        for name in names:
            kept[name].append(outputs[name].reshape(-1, outputs[name].shape[-1]))
    return {name: np.concatenate(rows) for name, rows in kept.items()}


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_a_layer_sees_what_rounded_layers_give(
    recorded: tuple[Bundle, Path], component: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, np.ndarray] = {}
    make = calibrate_module.Decision.make

    def spy(self: Any) -> None:
        seen[self._group.x.name] = self._statistics.sample
        make(self)

    monkeypatch.setattr(calibrate_module.Decision, "make", spy)
    findings = calibrated(recorded, component, Precision("blocks", 3, 32, method), tmp_path / "work")
    bundle = recorded[0]
    graph = ir.load(bundle.listed(bundle.variant(component, "cpu").file)).graph
    groups = {layer.name: group for group in find_groups(find_layers(graph)) for layer in group.layers}
    # Behind the first group of a piece its own layers are not rounded yet.
    names = [groups[s.layers[0]].x.name or "" for s in cut(graph, 0) if s.layers and s.layers[0] != HEAD]
    assert len(names) >= 4
    rounded = values(recorded, component, names[1:], findings, tmp_path, fitted=True)
    exact = values(recorded, component, names[1:], None, tmp_path, fitted=True)
    for name in names[1:]:
        rows = rounded[name][:: -(-len(rounded[name]) // 512)]
        assert len(seen[name]) == len(rows)
        scale = np.abs(rounded[name]).max()
        assert np.abs(seen[name] - rows).max() <= 1e-3 * scale, name
        assert np.abs(exact[name] - rounded[name]).max() > 1e-2 * scale, name


@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_later_layers_make_up_for_earlier_ones(recorded: tuple[Bundle, Path], component: str, tmp_path: Path) -> None:
    bundle = recorded[0]
    graph = ir.load(bundle.listed(bundle.variant(component, "cpu").file)).graph
    last = [layer.y.name or "" for layer in find_layers(graph) if layer.name != HEAD][-1]
    exact = values(recorded, component, [last], None, tmp_path)[last]
    lost = {}
    for sequential in (True, False):
        folder = tmp_path / str(sequential)
        findings = calibrated(recorded, component, Precision("blocks", 2, 32, "gptq"), folder, sequential)
        found = values(recorded, component, [last], findings, tmp_path)[last]
        lost[sequential] = float(np.square(found - exact).mean())
    assert lost[True] <= 0.7 * lost[False]


def test_nothing_is_passed_rounded_where_no_layer_is_by_gptq(
    recorded: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_module._State, "pass_rounded", None)  # would fail
    assert calibrated(recorded, "decoder", Precision("blocks", 4, 32, "awq"), tmp_path / "awq").errors()
    assert calibrated(recorded, "decoder", Precision("blocks", 4, 32, "gptq"), tmp_path / "gptq", False).errors()
    assert not list(tmp_path.glob("*/passing-rounded-*"))


def test_some_runs_are_held_apart() -> None:
    assert [sum(held_apart(i, runs) for i in range(runs)) for runs in (1, 3, 4, 5, 9, 48, 143)] == [
        0,
        0,
        1,
        1,
        1,
        9,
        28,
    ]
    assert {sum(held_apart(i, runs) for i in range(runs)) for runs in range(144, 2000)} <= {24, 25, 26, 27, 28}


def test_errors_are_those_of_rows_that_nothing_was_fitted_to(recorded: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, feeds = recorded
    findings = calibrated(recorded, "decoder", Precision("blocks", 4, 32, "gptq"), tmp_path / "work", False)
    graph = ir.load(bundle.listed(bundle.variant("decoder", "cpu").file)).graph
    layer = next(layer for layer in find_layers(graph) if layer.name != HEAD)
    name = layer.x.name or ""
    every = values(recorded, "decoder", [name], None, tmp_path)[name]
    fitted = values(recorded, "decoder", [name], None, tmp_path, fitted=True)[name]
    held = every[len(every) - len(every) // 6 * 2 : len(every) - len(every) // 6]  # of six runs alike the fifth
    assert len(held) == len(every) - len(fitted)
    found = findings.layer(layer.name)
    assert found is not None
    weight, chosen = layer.read_weight(), found.replaced()
    assert chosen is not None
    codes, scales = rtn.quantize_blocks(weight, 4, 32)
    rounded = ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(weight.shape)
    rows = Feeds(feeds / "decoder").read(4, ["inputs_embeds", "logits_indices"])
    weights, first = row_weights(rows, held[None]), Feeds(feeds / "decoder").read(0, ["inputs_embeds"])["inputs_embeds"]
    assert weights is not None
    shared = int(np.argmax((rows["inputs_embeds"] != first[:, : len(held)]).any(axis=(0, 2))))
    assert shared > 0
    weights[:shared] = 0  # the template's words, which were fitted to
    root = np.sqrt(weights)[:, None]

    def error(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(root * (held @ (matrix - weight).T)) / np.linalg.norm(root * (held @ weight.T)))

    assert found.error == pytest.approx(error(chosen), rel=1e-3)
    assert found.nearest_error == pytest.approx(error(rounded), rel=1e-3)
