"""Targets: which forms a bundle gets, what TensorRT makes of them, and what half precision costs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BundleError, ExportError
from mllm_edge.export.pipeline import export
from mllm_edge.export.targets import TARGETS, forms
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_build import build
from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs
from mllm_edge.runtime.vlm import VLM
from tests.families.parity import check_comparison
from tests.families.row import rows

STANDARD = ("tensorrt", "tensorrt-10.3")
CONFIGS = [
    pytest.param((family, config), id=f"{family}-{config}", marks=pytest.mark.xdist_group(f"bundle-{family}"))
    for family, row in rows().items()
    for config in row.for_targets
]


WITH_OTHER_PARTS = ("idefics3", "florence2", "mllama", "deepseek_vl_hybrid")
RECIPES = ("fp16", "int8", "int4")
NEEDED = (("fp16", "tensorrt"), ("fp16", "tensorrt-10.3"), ("int4", "tensorrt"))  # of every family
CODEBOOKS = (("chameleon", "connector"), ("emu3", "connector"))


def _is_calibrated(family: str) -> bool:
    return "calibration" not in rows()[family].spared


@pytest.fixture(scope="module", params=CONFIGS)
def of(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Family and config."""
    return request.param


@pytest.fixture(scope="module", params=RECIPES)
def exported(request: pytest.FixtureRequest, of: tuple[str, str], compared: Callable[..., Any]) -> Any:
    report, path = compared(*of, request.param)
    return report, Bundle.load(path)


def test_every_form_agrees_with_the_source(
    exported: Any, of: tuple[str, str], proves: Callable[[str, str, Iterable[str]], None]
) -> None:
    report, bundle = exported
    check_comparison(report, bundle)
    assert report.targets == rows()[bundle.manifest.model.family].reached
    results = [bundle.manifest.parity, *bundle.manifest.parity["targets"].values()]
    assert [parity["target"] for parity in results] == list(report.targets)
    proof = bundle.manifest.parity.get("float32")
    assert (proof is None) == (report.recipe == "fp16")
    for parity in [*results, proof] if proof else results:
        assert parity["limits"] or proof
        errors = {name: (parity["errors"][name], limit) for name, limit in parity["limits"].items()}
        assert all(0 <= error <= limit for error, limit in errors.values())
        # Rows that a codebook finds are found exactly.
        assert all(error or (of[0], name) in CODEBOOKS for name, (error, _) in errors.items())
    proves(of[0], "targets", report.targets)
    proves(of[0], "precisions", [report.recipe])


def test_variants_state_what_they_are(exported: Any) -> None:
    report, bundle = exported
    for name, component in bundle.manifest.components.items():
        assert [(v.target, v.dialect) for v in component.variants] == [(t, TARGETS[t]) for t in report.targets]
        assert [v.file for v in component.variants] == [
            f"{name}{'' if target == 'cpu' else f'.{target}'}.onnx" for target in report.targets
        ]
        for variant in component.variants[-2:]:
            kinds = {"float32"} if bundle.manifest.model.role(name) == "choice" else {"float16", "int64"}
            assert {t.dtype for t in variant.inputs} <= kinds
            assert variant.kv_mode == (
                None if name != "decoder" else "in_place" if variant.target == "tensorrt" else "append"
            )
            assert "tensorrt" in variant.minimum
            assert set(variant.ranges) == {n for t in variant.inputs for n in t.shape if isinstance(n, str)}
    assert set(report.components) >= {"decoder", "decoder.tensorrt", "decoder.tensorrt-10.3"}


@pytest.mark.parametrize(
    ("family", "target"), [(family, target) for family, row in rows().items() for target in row.refused]
)
def test_a_target_without_a_form_is_refused(
    saved: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    with pytest.raises(ExportError, match=rows()[family].refused[target]):
        export(str(saved(family)), tmp_path / "out", targets=[target], recipe_name="fp16", verify_mode="off")
    assert not (tmp_path / "out").exists()


# Of each family engines in 8 bits are built, too, of what was calibrated: tests/export/test_quantize.py. What is
# rounded for TensorRT 10.3 differs by operators, whatever the family.
@pytest.mark.parametrize(
    ("of", "exported", "target"),
    [
        pytest.param(*one.values, recipe, target, id=f"{one.id}-{recipe}-{target}", marks=one.marks)
        for recipe in RECIPES
        for target in STANDARD
        for one in CONFIGS
        if (recipe, target) in NEEDED or _is_calibrated(one.values[0][0])
    ],
    indirect=["of", "exported"],
    scope="module",
)
def test_tensorrt_builds_what_runs_before_the_decoder(exported: Any, target: str) -> None:
    _, bundle = exported
    components = [stage.component for stage in bundle.manifest.model.stages]
    assert components[:2] in (["vision_encoder", "connector"], ["vision_encoder"])
    for component in components:
        variant = bundle.variant(component, target)
        profiles, options = build_inputs(variant, Limits(64))
        engine = build(bundle.listed(variant.file), profiles, ["SM80", "SM86", "SM89", "SM120"], options=options)
        assert engine.nbytes > 0


# Which files a bundle has follows from its components alone: one family of each list of them.
@pytest.mark.parametrize("of", [one for one in CONFIGS if one.values[0][0] in WITH_OTHER_PARTS], indirect=True)
def test_without_the_fallback_only_the_target_is_there(
    of: tuple[str, str], saved: Callable[..., Path], tmp_path: Path
) -> None:
    report = export(
        str(saved(*of)), tmp_path / "out", targets=["tensorrt"], fallback=False, recipe_name="fp32", verify_mode="off"
    )
    assert report.targets == ("tensorrt",)
    bundle = Bundle.load(tmp_path / "out")
    components = {*(stage.component for stage in bundle.manifest.model.stages), "decoder"}
    assert components >= {"decoder", "vision_encoder"}
    assert {p.name for p in bundle.path.glob("*.onnx")} == {f"{name}.tensorrt.onnx" for name in components}
    with pytest.raises(BundleError, match="no variant for target 'cpu'"):
        VLM.load(bundle.path)
    with VLM(bundle, OnnxRuntimeCpu(target="tensorrt")) as vlm:
        assert vlm.generate("Hello.", max_new_tokens=3, ignore_eos=True).token_ids


def test_forms() -> None:
    assert [form.target for form in forms(["tensorrt-10.3", "tensorrt"], "int4")] == ["cpu", *STANDARD]
    assert [form.target for form in forms(list(TARGETS), "int4")] == list(TARGETS)
    assert [form.float_type.name for form in forms(["cuda"], "int8")] == ["FLOAT", "FLOAT16"]
    assert [form.float_type.name for form in forms(["tensorrt"], "fp16")] == ["FLOAT", "FLOAT16"]
    assert [form.float_type.name for form in forms(["tensorrt"], "fp32", fallback=False)] == ["FLOAT"]
    with pytest.raises(ExportError, match="unknown target 'gpu'"):
        forms(["gpu"], "int4")
    with pytest.raises(ExportError, match="no target"):
        forms([], "int4", fallback=False)
