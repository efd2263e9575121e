"""What is done about a loss: what is refused, what is written, what is said where none is measured."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import CALIBRATED, RECIPES, Recipe
from mllm_edge.cli.export import _summary
from mllm_edge.cli.inspect import _parity
from mllm_edge.errors import AccuracyError, ExportError, OptionError, ParityError, RecipeError
from mllm_edge.export import export_job, pipeline
from mllm_edge.export import judge as judge_module
from mllm_edge.export.judge import remedy
from mllm_edge.export.pipeline import export
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.json_form import to_json
from mllm_edge.loss import MAX_KL, NOT_MEASURED, WARN_KL, Loss, warning, words
from mllm_edge.progress import Silent
from tests.tiny import save_tiny_idefics3


def test_a_loss_beyond_what_is_allowed_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match=r"KL 0\.\d+ nats, the likeliest token stays in \d+% of \d+") as caught:
        export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", max_kl=0.001)
    assert "a KL of 0.001 is allowed" in caught.value.message
    assert "the float model answers" in caught.value.message
    for way in ("--recipe int8", "mllm-edge quantize", "--recipe fp16", "--allow-loss"):
        assert way in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AccuracyError) as caught:
        export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int8", max_kl=1e-9)
    assert "int8" not in caught.value.fix


@pytest.mark.usefixtures("rounded_int4")
def test_an_allowed_loss_is_written_and_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", max_kl=0.001, allow_loss=True)
    assert 0.001 < report.loss["kl"] < MAX_KL
    assert Bundle.load(tmp_path / "out").manifest.accuracy == {"loss": report.loss}
    assert not report.loss_not_measured
    assert (report.loss["kl"] >= WARN_KL) == bool(report.warning) == (report.loss["kl_8_bits"] is not None)
    assert report.loss["kl_8_bits"] < report.loss["kl"] / 10  # this model's rounding is noticed
    assert "--recipe int8" in report.warning
    json.dumps(report.as_dict())


def test_eight_bits_of_a_model_lose_little(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int8")
    assert report.loss["kl"] < 0.01
    assert "cpu in float32 against the source model (whole)" in _summary({**report.as_dict(), "seconds": 1.0})
    assert "parity of cpu in float32 (whole)" in _parity(Bundle.load(tmp_path / "out"))
    assert report.loss["kl_8_bits"] is None
    assert report.warning == ""


def test_float_recipes_have_limits_and_no_loss(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export(str(tiny_checkpoint), tmp_path / "out", recipe_name="fp16")
    assert (report.loss, report.loss_not_measured) == ({}, "")
    assert set(report.parity["limits"]) == set(report.parity["errors"])
    assert Bundle.load(tmp_path / "out").manifest.accuracy == {}


def test_each_target_is_measured(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", targets=["tensorrt"])
    assert list(report.loss["targets"]) == ["tensorrt"]
    other = report.loss["targets"]["tensorrt"]["kl"]
    assert 0 < other != report.loss["kl"]
    measure = judge_module.measure

    def much(references: Any, folder: Path, target: str) -> Loss:
        loss = measure(references, folder, target)
        return replace(loss, kl=0.11) if target == "cpu" else replace(loss, kl=0.6)

    monkeypatch.setattr(judge_module, "measure", much)
    monkeypatch.setattr(judge_module, "require_rounding", lambda *arguments: None)
    with pytest.raises(AccuracyError, match=r"KL 0\.60"):
        export(str(tiny_checkpoint), tmp_path / "other", recipe_name="int4", targets=["tensorrt"])


def test_the_target_that_loses_most_decides(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About more bits, about the warning, and what is refused; each is told, and a loss is measured once."""
    measure, measured = judge_module.measure, list[str]()

    def more_for_tensorrt(references: Any, folder: Path, target: str) -> Loss:
        measured.append(target)
        loss = measure(references, folder, target)
        return replace(loss, kl=0.01 if target == "cpu" else 0.2)

    monkeypatch.setattr(judge_module, "measure", more_for_tensorrt)
    monkeypatch.setattr(judge_module, "require_rounding", lambda *arguments: None)
    options: Any = {"recipe_name": "int4", "targets": ["tensorrt"]}
    report = export(str(tiny_checkpoint), tmp_path / "raised", **options)
    assert measured == ["cpu", "tensorrt"] * 2
    assert Bundle.load(tmp_path / "raised").manifest.recipe["rules"]
    assert report.warning.startswith("this bundle answers differently from its float model for tensorrt: KL 0.20 nats")
    shown = words({"loss": report.loss}).splitlines()
    assert shown[0].startswith("loss: KL 0.01 nats")
    assert shown[-1].startswith("loss for tensorrt: KL 0.20 nats")
    with pytest.raises(AccuracyError, match=r"loses too much for tensorrt: KL 0\.20"):
        export(str(tiny_checkpoint), tmp_path / "refused", max_kl=0.1, **options)
    measured.clear()
    monkeypatch.setitem(RECIPES, "int4", replace(RECIPES["int4"], more_bits_above=0.3))
    export(str(tiny_checkpoint), tmp_path / "kept", **options)
    assert measured == ["cpu", "tensorrt"]
    assert Bundle.load(tmp_path / "kept").manifest.recipe["rules"] == []


def test_a_demand_below_the_recipes_gets_more_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What they can meet is not refused."""
    four = export(str(tiny_checkpoint), tmp_path / "four", recipe_name="int4").loss["kl"]
    assert four < RECIPES["int4"].more_bits_above
    report = export(str(tiny_checkpoint), tmp_path / "more", recipe_name="int4", max_kl=0.95 * four)
    assert report.loss["kl"] <= 0.95 * four
    assert Bundle.load(tmp_path / "more").manifest.recipe["rules"]


@pytest.mark.parametrize(
    ("recipe", "samples", "ways"),
    [
        (RECIPES["int4"], None, ["--recipe int8", "calibrate: mllm-edge quantize", "--recipe fp16"]),
        (RECIPES["int8"], None, ["--recipe fp16"]),
        (CALIBRATED["int4"], 0, ["--recipe int8", "give questions of your own as --data", "--recipe fp16"]),
        (CALIBRATED["int4"], 9, ["--recipe int8", "give more samples", "--recipe fp16"]),
        (CALIBRATED["int8"], 9, ["give more samples", "--recipe fp16"]),
        (CALIBRATED["int8"], 0, ["give questions of your own as --data", "--recipe fp16"]),
    ],
)
def test_the_remedy_is_another_one(recipe: Recipe, samples: int | None, ways: list[str]) -> None:
    found = remedy(recipe, samples).split(", or ")
    assert len(found) == len(ways)
    assert all(way in text for way, text in zip(ways, found, strict=True))


def _scaled(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, attention=replace(spec.attention, scale=2 * spec.attention.scale))


def _offset(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, norm=replace(spec.norm, offset=1.0))


def _build_wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[DecoderSpec], DecoderSpec], *wrong: str) -> None:
    """Of the decoder, by all recipes that `wrong` names."""
    build = export_job.build_decoder

    def built(spec: DecoderSpec, weights: Any, recipe: Any, *rest: Any) -> Any:
        return build(change(spec) if recipe.name in wrong else spec, weights, recipe, *rest)

    monkeypatch.setattr(export_job, "build_decoder", built)


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize("change", [_scaled, _offset])
@pytest.mark.parametrize("limit", [pipeline.WHOLE_LIMIT, 1000])
def test_a_wrong_graph_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, change: Any, limit: int
) -> None:
    """Whatever may be lost, and when only the first layers of a large model are compared, too."""
    save_tiny_idefics3(tmp_path / "model", text={"num_hidden_layers": 3})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", limit)
    _build_wrong(monkeypatch, change, recipe)
    with pytest.raises(ParityError, match=r"disagree with the source model: KL .* costs KL"):
        export(str(tmp_path / "model"), tmp_path / "out", recipe_name=recipe, allow_loss=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    _build_wrong(monkeypatch, change, "fp32")
    with pytest.raises(ParityError, match=r"cpu disagree with the source model: prefill_logits .* > 0\.001; decode"):
        export(str(tmp_path / "model"), tmp_path / "out", recipe_name=recipe, allow_loss=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("whole", [True, False])
def test_quantized_graphs_are_proven_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """By the first form, its first layers where all would take much room; nothing of that stays in the bundle."""
    save_tiny_idefics3(tmp_path / "model", text={"num_hidden_layers": 3})
    monkeypatch.setattr(export_job, "_FLOAT_LIMIT", export_job._FLOAT_LIMIT if whole else 1000)
    export(str(tmp_path / "model"), tmp_path / "out", targets=["tensorrt"], fallback=False, recipe_name="int4")
    bundle = Bundle.load(tmp_path / "out")
    proof = bundle.manifest.parity["float32"]
    limits = {"vision_encoder": 1e-4, "connector": 1e-4, "prefill_logits": 1e-3, "decode_logits": 1e-3}
    assert proof["limits"] == limits
    assert all(0 < proof["errors"][name] <= limit for name, limit in limits.items())
    assert (proof["target"], proof["greedy_agreement"]) == ("tensorrt", 1.0)
    assert proof["scope"] == ("whole" if whole else "decoder: first 2 layers and head")
    assert bundle.manifest.parity["limits"] == {}
    assert not (tmp_path / "out" / "probe").exists()


def test_a_large_model_says_that_its_loss_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_idefics3(tmp_path / "model", text={"num_hidden_layers": 4})
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 1000)
    report = export(str(tmp_path / "model"), tmp_path / "out", recipe_name="int4", max_kl=0.0)
    assert report.loss == {}
    command = f"mllm-edge compare {tmp_path / 'model'} {tmp_path / 'out'}"
    for part in ("only the first layers are compared", "--verify full", command):
        assert part in report.loss_not_measured
    assert Bundle.load(tmp_path / "out").manifest.accuracy == {NOT_MEASURED: report.loss_not_measured}
    whole = export(str(tmp_path / "model"), tmp_path / "whole", recipe_name="int4", verify_mode="full")
    assert whole.loss["kl"] > 0


def test_without_a_comparison_the_loss_is_unknown(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", verify_mode="off")
    assert "--verify off" in report.loss_not_measured
    assert f"mllm-edge compare {tiny_checkpoint} {tmp_path / 'out'}" in report.loss_not_measured
    assert "by an export without --verify off" in report.loss_not_measured
    assert words(Bundle.load(tmp_path / "out").manifest.accuracy).startswith("loss not measured: nothing was compared")
    adapter = _empty_adapter(tmp_path / "adapter")
    report = export(str(tiny_checkpoint), tmp_path / "merged", verify_mode="off", adapters=[adapter])
    assert "mllm-edge compare" not in report.loss_not_measured  # it would compare with the model without the adapter
    assert "by an export without --verify off" in report.loss_not_measured
    report = export(str(tiny_checkpoint), tmp_path / "float", recipe_name="fp32", verify_mode="off")
    assert report.loss_not_measured == ""


def _empty_adapter(folder: Path) -> Path:
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_questions_that_cannot_be_asked(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_edge.export import loss

    monkeypatch.setattr(loss, "QUESTIONS", ("zzz " * 2000,))
    report = export(str(tiny_checkpoint), tmp_path / "long", recipe_name="int4")
    assert "a context of 1024 tokens holds none of the built-in questions" in report.loss_not_measured
    monkeypatch.setattr(loss, "QUESTIONS", ("What?",))
    monkeypatch.setattr(loss.Tokenizer, "decode", lambda self, ids: "[UNK]")
    report = export(str(tiny_checkpoint), tmp_path / "words", recipe_name="int4")
    assert "the tokenizer has no tokens for the words" in report.loss_not_measured
    assert "mllm-edge compare MODEL BUNDLE --prompt" in report.loss_not_measured


def test_a_template_that_takes_no_question_is_named(tmp_path: Path) -> None:
    save_tiny_idefics3(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('only pictures') }}")
    with pytest.raises((ExportError, ValueError), match="only pictures"):
        export(str(tmp_path / "model"), tmp_path / "out", recipe_name="int4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_what_is_no_divergence(tiny_checkpoint: Path, tmp_path: Path, value: float) -> None:
    with pytest.raises(OptionError, match="max_kl"):
        export(str(tiny_checkpoint), tmp_path / "out", max_kl=value)


def test_words() -> None:
    loss = Loss(0.26, 0.761, 365, 0.0042, 0.97, "Why?", "Because\nof \x1b[31mit", "x " * 200)
    lines = words({"loss": to_json(loss)}).splitlines()
    assert lines[0] == "loss: KL 0.26 nats, the likeliest token stays in 76% of 365 (8 bits: KL 0.0042, 97%)"
    assert lines[1:3] == ["  asked:       Why?", "  float model: Because of [31mit"]
    assert lines[3].startswith("  this bundle: x x x")
    assert lines[3].endswith(" …")
    assert words({}) == ""
    assert "differently" in warning(to_json(loss), "do this")
    assert warning(to_json(replace(loss, kl=0.05)), "do this") == ""


def test_more_bits_where_the_loss_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that cost most; measured, and in the manifest."""
    told: list[str] = []

    class Told(Silent):
        def notice(self, text: str) -> None:
            told.append(text)

    losses, kept, sizes = {}, {}, {}
    for name, above in (("never", None), ("rarely", 10.0), ("always", 1e-6)):
        monkeypatch.setitem(RECIPES, "int4", replace(RECIPES["int4"], more_bits_above=above))
        report = export(str(tiny_checkpoint), tmp_path / name, recipe_name="int4", progress=Told())
        bundle = Bundle.load(tmp_path / name)
        bundle.check_all()
        losses[name], kept[name] = report.loss["kl"], _bits(bundle)
        assert bool(told) == (name == "always")
        sizes[name] = report.components["decoder"]
        assert bool(bundle.manifest.recipe["rules"]) == (name == "always")
    assert "those that cost most have more bits" in told[0]
    assert kept["never"] == kept["rarely"]
    assert set(kept["never"].values()) == {4}
    raised = {name for name, bits in kept["always"].items() if bits == 8}
    rules = bundle.manifest.recipe["rules"]
    assert raised == {rule["layers"] for rule in rules if rule["precision"]["bits"] == 8}
    assert any(name.endswith("v_proj") for name in raised)
    assert not (tmp_path / "always" / "probe").exists()
    assert sizes["always"] > sizes["never"] == sizes["rarely"]
    assert losses["always"] < losses["never"] == losses["rarely"]


def _bits(bundle: Bundle) -> dict[str, int]:
    """Of the decoder's layers but its head."""
    graph = ir.load(bundle.listed(bundle.variant("decoder", "cpu").file)).graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits" and node.name != "lm_head"]
    return {str(node.name): node.attributes["bits"].as_int() for node in nodes}


def test_so_many_bits_at_most_without_data(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The head gives way first; what fits and loses little is left as it is."""
    with pytest.raises(RecipeError) as refused:
        export(str(tiny_checkpoint), tmp_path / "refused", recipe_name="int4", most_bits=1.0)
    fewest = float(refused.value.fix.split()[2])
    reports = {
        most: export(str(tiny_checkpoint), tmp_path / str(most), recipe_name="int4", most_bits=most)
        for most in (fewest, 12.0)
    }
    told = re.search(r"\(([\d.]+) bits a weight\)", reports[fewest].notices[-1])
    assert told
    assert "all of the decoder's" in reports[fewest].notices[-1]
    assert fewest - 0.011 <= float(told[1]) <= fewest
    assert reports[12.0].notices == ()
    assert reports[fewest].components["decoder"] < reports[12.0].components["decoder"]
    heads = [Bundle.load(tmp_path / str(most)).manifest.recipe["head"]["bits"] for most in reports]
    assert heads == [4, 8]


@pytest.mark.parametrize(
    ("most", "options", "what"),
    [
        (1.0, {}, r"most_bits = 1, and the decoder takes 4\.\d\d bits a weight"),
        (6.0, {"verify_mode": "off"}, "most_bits = 6, and nothing is measured"),
        (6.0, {"recipe_name": "int8"}, "most_bits = 6, and recipe int8 gives every layer"),
        (-1.0, {}, "most_bits = -1.0"),
    ],
)
def test_bits_that_no_export_can_give(
    tiny_checkpoint: Path, tmp_path: Path, most: float, options: dict[str, Any], what: str
) -> None:
    with pytest.raises((OptionError, RecipeError), match=what):
        export(str(tiny_checkpoint), tmp_path / "out", **{"recipe_name": "int4", "most_bits": most, **options})
    assert list(tmp_path.iterdir()) == []


def test_bits_of_a_large_model_need_a_whole_comparison(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WHOLE_LIMIT", 0)
    with pytest.raises(OptionError, match=r"only the first layers are measured\n.*--verify full"):
        export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", most_bits=6.0)
    export(str(tiny_checkpoint), tmp_path / "out", recipe_name="int4", most_bits=6.0, verify_mode="full")
