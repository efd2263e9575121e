"""Calibrated quantization of whole bundles: forms, agreement between targets, proof, gates, interruption."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from mllm_edge.bundle import MANIFEST, Bundle
from mllm_edge.calibration import calibrate as calibrate_module
from mllm_edge.calibration import whole
from mllm_edge.calibration.recipes import CALIBRATED, Recipe, Rule
from mllm_edge.calibration.sensitivity import measure_ways
from mllm_edge.errors import AccuracyError, BundleError, DataError, ExportError, RecipeError
from mllm_edge.export.quantize import FIGURE, FromCheckpoint, Gate, quantize
from mllm_edge.export.targets import TARGETS
from mllm_edge.graph.precision import FLOAT16, Precision
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_build import build
from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs
from mllm_edge.runtime.vlm import VLM
from tests.families.parity import FLOAT32_TARGETS
from tests.families.row import families_of, rows

RECIPES = ("int8", "int4", "mixed", "fp8", "w4a8")
# In 8 bits, weights and activations, every family whose layers are its own; in other recipes those that go through the
# tests of calibration.
QUANTIZED = [
    pytest.param((family, recipe), id=f"{family}-{recipe}", marks=pytest.mark.xdist_group(f"bundle-{family}"))
    for family, row in rows().items()
    for recipe in (RECIPES[:1] if "calibration" in row.spared else RECIPES)
    if recipe != "int8" or "eight_bits" not in row.spared
]
# TensorRT 10.3's forms differ in operators, whatever the family: those of calibration show them.
BUILT = [
    pytest.param(*one.values, target, id=f"{one.id}-{target}", marks=one.marks)
    for target in ("tensorrt", "tensorrt-10.3")
    for one in QUANTIZED
    if target == "tensorrt" or "calibration" not in rows()[one.values[0][0]].spared
]


def samples(count: int = 12) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    answers = ("two red boxes", None)
    return [
        {
            "images": [random.integers(0, 256, (40 + i, 64, 3), dtype=np.uint8)],
            "prompt": f"What is on belt {i}?",
            "answer": answers[i % 2],
        }
        for i in range(count)
    ]


# Half precision alone moves the tiny model's logits five times as far as llava's.
HALF_MATTERS = {"paligemma": 0.08}
# What happens around a calibration is the same for all; kernels take what they take of any decoder.
ONE = pytest.mark.parametrize("family", families_of("calibration")[:1], scope="module")
TWO = pytest.mark.parametrize("family", families_of("calibration")[2:4], scope="module")


@pytest.fixture(scope="module", params=families_of("calibration"))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def halves(compared: Callable[..., Any]) -> Callable[[str], Path]:
    """`halves(family)`: the half-precision bundle for all targets of a row's first config; read only."""
    return lambda family: compared(family, rows()[family].first, "fp16")[1]


@pytest.fixture(scope="module")
def float_bundle(family: str, halves: Callable[[str], Path]) -> Path:
    return halves(family)


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(
    request: pytest.FixtureRequest, halves: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """(recipe, report, bundle, what was quantized)"""
    (family, recipe), out = request.param, tmp_path_factory.mktemp("out") / request.param[1]
    source = halves(family)
    return recipe, quantize(source, out, recipe=recipe, data=samples()), Bundle.load(out), source


def test_report_and_manifest_hold_the_proof(quantized: Any) -> None:
    name, report, bundle, float_bundle = quantized
    assert (report.samples, report.held_back) == (9, 3)
    proof = bundle.manifest.accuracy
    assert proof["kl"] == report.proof.kl >= 0
    assert 0 < proof["top1"] <= 1
    assert proof["components"]["vision_encoder"]["sqnr"] > 10
    assert proof["exact_match"] is not None
    assert proof["nbytes"][0] > proof["nbytes"][1] > 0
    assert bundle.manifest.recipe["name"] == name
    assert not (bundle.path.parent / f".{name}.calibration").exists()
    attending = sum(len(spec.layers) for spec in bundle.manifest.model.state if spec.kind == "growing")
    decided = [layer for layer in proof["layers"]["decoder"] if layer.endswith(".qk_proj")]
    assert len(decided) == attending or name == "mixed"
    with Image.open(bundle.path / FIGURE) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 200
    bundle.verify()
    Bundle.load(float_bundle).verify()


def test_targets_answer_alike(quantized: Any) -> None:
    """The same codes and ranges in every dialect: differences are those of half precision and symmetric ranges."""
    bundle = quantized[2]
    logits = {target: _logits(bundle, target) for target in rows()[bundle.manifest.model.family].reached}
    spread = np.ptp(logits["cpu"])
    # Half precision rounds a value to another code now and then; ranges that need not be symmetric, and activations in
    # 8 bits beside weights in blocks, make `cpu` the odd one out.
    # A step between float8 numbers is an eighth of them; in int8 it is 1/127 of the range (seen: 0.08 and 0.16).
    alike = 0.15 if quantized[0] == "fp8" else HALF_MATTERS.get(bundle.manifest.model.family, 0.05)
    assert np.abs(logits["tensorrt"] - logits["tensorrt-10.3"]).max() <= alike * spread
    assert np.abs(logits["tensorrt"] - logits["cpu"]).max() <= (0.25 if quantized[0] == "fp8" else 0.15) * spread
    if "cuda" in logits:
        assert np.abs(logits["cuda"] - logits["cpu"]).max() <= 0.15 * spread


# The lowest compute capabilities that TensorRT has each form for, and newer ones.
CAPABILITIES = {
    "int8": ["SM75", "SM80", "SM86", "SM89", "SM120"],
    "fp8": ["SM89", "SM120"],
}
BLOCKS = ["SM80", "SM86", "SM89", "SM120"]


@pytest.mark.parametrize(("quantized", "target"), BUILT, indirect=["quantized"], scope="module")
def test_tensorrt_builds_what_was_quantized(quantized: Any, target: str) -> None:
    recipe, _, bundle, _ = quantized
    assert set(bundle.manifest.components) >= {"vision_encoder", "decoder"}
    for component in bundle.manifest.components:
        plain = bundle.manifest.model.role(component) == "choice"  # in float32, which Turing has no products of
        assert engine_bytes(bundle, component, target, BLOCKS if plain else CAPABILITIES.get(recipe, BLOCKS)) > 0


def engine_bytes(bundle: Bundle, component: str, target: str, capabilities: list[str]) -> int:
    """The size of a component's engine, built after a check of what TensorRT made of the graph."""
    variant = bundle.variant(component, target)
    profiles, options = build_inputs(variant, Limits(64))
    in_place = variant.kv_mode == "in_place"
    assert options.cache_updates == (2 * len(bundle.manifest.model.state[0].layers) if in_place else 0)
    return build(bundle.listed(variant.file), profiles, capabilities, options=options).nbytes


def test_int8_graphs_hold_what_each_side_demands(float_bundle: Path, tmp_path: Path) -> None:
    quantize(float_bundle, tmp_path / "out", recipe="int8", data=samples())
    bundle = Bundle.load(tmp_path / "out")
    kinds = {t: _operators(bundle, "decoder", t) for t in TARGETS}
    assert kinds["cpu"]["MatMulIntegerToFloat"] > 0
    assert kinds["cpu"]["MatMul"] == 0
    # CUDA has no kernels for activations in 8 bits: weights alone, in blocks.
    assert kinds["cuda"] == {"MatMul": 0, "MatMulIntegerToFloat": 0}
    for target in ("tensorrt", "tensorrt-10.3"):
        graph = ir.load(bundle.listed(bundle.variant("decoder", target).file)).graph
        zeros = [v for n, v in graph.initializers.items() if n.endswith(".input.zero")]
        assert zeros
        for zero in zeros:
            assert zero.const_value is not None
            assert zero.const_value.numpy() == 0
            assert zero.const_value.dtype == ir.DataType.INT8


def _operators(bundle: Bundle, component: str, target: str) -> Mapping[str, int]:
    nodes = list(ir.load(bundle.listed(bundle.variant(component, target).file)).graph)
    return {kind: sum(n.op_type == kind for n in nodes) for kind in ("MatMul", "MatMulIntegerToFloat")}


def test_factors_alone_change_nothing(family: str, floats: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights stay float, only scaled: what was folded into norms and neighbours cancels in every target."""
    part = Precision("float32", method="smoothquant")
    recipe = Recipe("factors", part, part, part, part)
    quantize(floats(family), tmp_path / "out", recipe=recipe, data=samples())
    changed = 0
    for target in FLOAT32_TARGETS:
        logits = []
        for folder in (floats(family), tmp_path / "out"):
            bundle = Bundle.load(folder)
            with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
                prompt = vlm.processor.process("Where?", samples()[0]["images"])
                logits.append(vlm.steps(vlm.encode(prompt), np.zeros(1, np.int64))[0])
        assert np.abs(logits[0] - logits[1]).max() <= 1e-3 * np.ptp(logits[0])
        name = "layers.0.experts.0.up_proj.weight" if family == "aria" else "layers.0.up_proj.weight"
        weights = [_initializer(folder, "decoder", target, name) for folder in (floats(family), tmp_path / "out")]
        changed += not np.allclose(*weights, rtol=0.05)
    assert changed == len(FLOAT32_TARGETS)


def _initializer(folder: Path, component: str, target: str, name: str) -> np.ndarray:
    bundle = Bundle.load(folder)
    graph = ir.load(bundle.listed(bundle.variant(component, target).file)).graph
    value = graph.initializers[name].const_value
    assert value is not None
    return value.numpy().copy()


def test_calibration_loses_less_than_rounding(float_bundle: Path, tmp_path: Path) -> None:
    nearest = replace(CALIBRATED["int4"], decoder=Precision("blocks", 4, method="rtn"))
    kl = {
        name: quantize(float_bundle, tmp_path / name, recipe=recipe, data=samples(24)).proof.kl
        for name, recipe in (("rtn", nearest), ("int4", CALIBRATED["int4"]))
    }
    assert kl["int4"] < 0.7 * kl["rtn"]


@ONE
def test_the_whole_decoder_is_rounded_where_that_is_better(
    float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("part", FLOAT16, FLOAT16, Precision("blocks", 4, method="awq+gptq"), FLOAT16)
    better = quantize(float_bundle, tmp_path / "better", recipe=recipe, data=samples())
    assert better.against_rounding is not None
    found, rounded, error = better.against_rounding
    assert 0 < found < rounded
    assert Bundle.load(tmp_path / "better").manifest.accuracy["kl_against_rounding"] == [found, rounded, error]

    def swapped(*arguments: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        losses = measure_ways(*arguments)
        return {**losses, "found": losses["rounded"], "rounded": losses["found"]} if "found" in losses else losses

    monkeypatch.setattr(whole, "measure_ways", swapped)
    worse = quantize(float_bundle, tmp_path / "worse", recipe=recipe, data=samples())
    assert worse.against_rounding == pytest.approx((rounded, found, error))
    assert rounded - found > 2 * error
    assert not worse.layers["decoder"]
    plain = replace(recipe, decoder=Precision("blocks", 4))
    quantize(float_bundle, tmp_path / "plain", recipe=plain, data=samples())
    files = [Bundle.load(tmp_path / name).manifest.files for name in ("worse", "plain")]
    assert {n: e.sha256 for n, e in files[0].items() if n.endswith(".data")} == {
        n: e.sha256 for n, e in files[1].items() if n.endswith(".data")
    }


@TWO
@pytest.mark.parametrize(
    ("method", "block", "bits"),
    [("gptq", 32, 8), ("awq", 64, 8), ("awq+gptq", 128, 8), ("rtn", 32, 4), ("gptq", 64, 4), ("awq", 128, 4)],
)
def test_blocks_of_every_size_and_method(
    float_bundle: Path, tmp_path: Path, method: Any, block: int, bits: int
) -> None:
    """Weights alone, in the decoder: close to float, and in every target the same."""
    part = Precision("blocks", bits, block, method)
    recipe = Recipe("blocks", FLOAT16, FLOAT16, part, part)
    proof = quantize(float_bundle, tmp_path / "out", recipe=recipe, data=samples()).proof
    assert proof.kl <= (0.3 if bits == 4 else 0.01)
    bundle = Bundle.load(tmp_path / "out")
    logits = {target: _logits(bundle, target) for target in TARGETS}
    # Rounding to the nearest uses negative scales where it may, which is not in TensorRT: other codes.
    for target in ("tensorrt", "tensorrt-10.3") if method != "rtn" else ():
        assert np.abs(logits[target] - logits["cpu"]).max() <= 0.1 * np.ptp(logits["cpu"])


def _logits(bundle: Bundle, target: str) -> np.ndarray:
    sample = samples()[1]
    with VLM(bundle, OnnxRuntimeCpu(target=target)) as vlm:
        prompt = vlm.processor.process(sample["prompt"], sample["images"])
        return vlm.steps(vlm.encode(prompt), np.zeros(1, np.int64))[0]


@ONE
@pytest.mark.parametrize("size", [0.55, 0.7])
def test_mixed_keeps_to_its_size(float_bundle: Path, size: float, tmp_path: Path) -> None:
    """Of the first target's files; a quantized graph itself is some kilobytes longer."""
    (tmp_path / "r.toml").write_text(f'base = "mixed"\nsize = {size}')
    quantize(float_bundle, tmp_path / "out", recipe=str(tmp_path / "r.toml"), data=samples())
    nbytes = []
    for path in (float_bundle, tmp_path / "out"):
        manifest = Bundle.load(path).manifest
        components = manifest.components.values()
        others = {v.file for c in components for v in c.variants} - {c.variants[0].file for c in components}
        files = {n: f.nbytes for n, f in manifest.files.items() if n.removesuffix(".data") not in others}
        nbytes.append(sum(f for n, f in files.items() if n != FIGURE))
    assert nbytes[1] / nbytes[0] < size + 0.02


@ONE
def test_mixed_takes_as_many_bits_as_a_gate_wants(float_bundle: Path, tmp_path: Path) -> None:
    def layers_raised(gate: Gate | None, name: str) -> tuple[int, float]:
        report = quantize(float_bundle, tmp_path / name, recipe="mixed", data=samples(), gate=gate)
        return len(Bundle.load(tmp_path / name).manifest.recipe["rules"]), report.proof.kl

    few, loose = layers_raised(Gate(max_kl=1.0), "loose")
    assert few == 0
    most = loose / 3
    some, kl = layers_raised(Gate(max_kl=most), "tight")
    assert some > 0
    assert kl <= most
    with pytest.raises(AccuracyError, match="KL divergence"):
        layers_raised(Gate(max_kl=1e-12), "impossible")


@ONE
def test_layers_are_not_tuned_to_errors_that_raising_takes_away(
    float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_module._State, "pass_rounded", None)  # would fail
    assert quantize(float_bundle, tmp_path / "out", recipe="mixed", data=samples()).layers["decoder"]


@ONE
def test_missed_gate_names_layers_and_writes_nothing(float_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match=r"KL divergence .* > 1e-12\. Layers with the largest error: decoder: "):
        quantize(float_bundle, tmp_path / "out", recipe="int4", data=samples(), gate=Gate(max_kl=1e-12))
    assert not (tmp_path / "out").exists()
    with pytest.raises(AccuracyError, match=r"agrees in .* < 100\.01%"):
        quantize(float_bundle, tmp_path / "out", recipe="int4", data=samples(), gate=Gate(min_agreement=1.0001))


@ONE
def test_interrupted_calibration_goes_on(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(float_bundle, tmp_path / "whole", recipe="int4", data=samples())
    decided: list[str] = []
    make = calibrate_module.Decision.make

    def stop(self: Any) -> None:
        decided.append(self._group.layers[0].name)
        if len(decided) == 3:
            raise KeyboardInterrupt
        make(self)

    monkeypatch.setattr(calibrate_module, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(calibrate_module.Decision, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(float_bundle, tmp_path / "out", recipe="int4", data=samples())
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.calibration" / "recorded").exists()
    monkeypatch.setattr("mllm_edge.calibration.quantize_job.record", None)  # would fail: it must not record again
    again: list[str] = []

    def count(self: Any) -> None:
        again.append(self._group.layers[0].name)
        make(self)

    monkeypatch.setattr(calibrate_module.Decision, "make", count)
    report = quantize(float_bundle, tmp_path / "out", recipe="int4", data=samples())
    assert decided[0] not in again
    assert report.proof.kl == pytest.approx(whole.proof.kl, rel=0.05)
    assert not (tmp_path / ".out.calibration").exists()


@ONE
def test_other_data_starts_anew(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / ".out.calibration"
    stale.mkdir()
    (stale / "key").write_text("of another calibration")
    (stale / "recorded").touch()
    quantize(float_bundle, tmp_path / "out", recipe="int4", data=samples())
    assert Bundle.load(tmp_path / "out").manifest.accuracy["calibration_samples"] == 9


@ONE
def test_checkpoint_is_exported_on_the_way(family: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = saved(family)
    report = quantize(
        str(checkpoint), tmp_path / "out", recipe="int4", data=samples(), checkpoint=FromCheckpoint(("tensorrt",))
    )
    bundle = Bundle.load(tmp_path / "out")
    assert {v.target for v in bundle.manifest.components["decoder"].variants} == {"cpu", "tensorrt"}
    assert report.source == str(checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@ONE
def test_what_cannot_be_quantized(float_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(float_bundle, out, recipe="int4", data=samples())
    with pytest.raises(BundleError, match="is quantized already"):
        quantize(out, tmp_path / "twice", recipe="int4", data=samples())
    with pytest.raises(ExportError, match="exists already"):
        quantize(float_bundle, out, recipe="int4", data=samples())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image files"):
        quantize(float_bundle, tmp_path / "none", recipe="int4", data=tmp_path / "empty")
    with pytest.raises(DataError, match="the data holds no samples"):
        quantize(float_bundle, tmp_path / "none", recipe="int4", data=[])
    with pytest.raises(DataError, match="4 samples, 1 of them held back"):
        quantize(float_bundle, tmp_path / "few", recipe="int4", data=samples(4))
    with pytest.raises(DataError, match="no sample is held back"):
        quantize(float_bundle, tmp_path / "few", recipe="int4", data=samples(), held_back=0)
    with pytest.raises(DataError, match="no data, and no built-in text"):
        quantize(float_bundle, tmp_path / "none", recipe="int4", builtin=False)
    rule = Rule("vision_encoder", "*", CALIBRATED["int8"].vision)
    texts = [{"prompt": f"Question {i}?"} for i in range(8)]
    with pytest.raises(
        DataError, match="no sample has an image, and a rule of recipe int8 calibrates vision_encoder: "
    ):
        quantize(float_bundle, tmp_path / "text", recipe=replace(CALIBRATED["int8"], rules=(rule,)), data=texts)
    rules = tmp_path / "r.toml"
    rules.write_text('[[rules]]\ncomponent = "decoder"\nlayers = "layers.0.upproj"\nkind = "float16"')
    with pytest.raises(RecipeError, match=r"layers.0.upproj matches no layer\n.*near matches: .*layers.0.\w+_proj"):
        quantize(float_bundle, tmp_path / "rules", recipe=str(rules), data=samples())
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "out", "r.toml"}


@ONE
def test_broken_image_names_its_line(float_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    lines = [json.dumps({"images": ["a.png"], "prompt": f"{i}?"}) for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"data\.jsonl, line \d: "):
        quantize(float_bundle, tmp_path / "out", recipe="int4", data=tmp_path / "data.jsonl")


@ONE
def test_text_only_recipe_takes_text_only_data(float_bundle: Path, tmp_path: Path) -> None:
    part = Precision("float16", 16)
    recipe = replace(CALIBRATED["int4"], vision=part, connector=part)
    quantize(float_bundle, tmp_path / "out", recipe=recipe, data=[{"prompt": f"Question {i}?"} for i in range(8)])
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["accuracy"]["components"] == {}
    assert manifest["components"]["vision_encoder"]["variants"][0]["precision"] == "float16"
