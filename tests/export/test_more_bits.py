"""A calibrated int4 whose rounding would cost too much keeps more bits where they matter most."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.mixed import with_more_bits
from mllm_edge.calibration.recipes import (
    BLOCKS_8,
    CALIBRATED,
    FLOAT16,
    INT8_TOKEN,
    Precision,
    Recipe,
    Rule,
    precision_of,
)
from mllm_edge.errors import OptionError
from mllm_edge.export import quantize_job
from mllm_edge.export.pipeline import export
from mllm_edge.export.progress import Silent
from mllm_edge.export.quantize import Gate, quantize
from tests.tiny import save_tiny_idefics3

INT4 = replace(CALIBRATED["int4"], vision=FLOAT16, connector=FLOAT16)


class Told(Silent):
    def __init__(self) -> None:
        self.titles: list[str] = []
        self.notices: list[str] = []

    def stage(self, title: str, total: int = 0) -> None:
        self.titles.append(title)

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny_idefics3(folder / "model", text={"num_hidden_layers": 6})
    export(str(folder / "model"), folder / "fp16", recipe_name="fp16", verify_mode="off")
    return folder / "fp16"


def samples() -> list[dict[str, Any]]:
    return [{"prompt": f"What is on belt {i}?", "answer": "two red boxes"} for i in range(10)]


def quantized(source: Path, out: Path, recipe: Recipe, told: Told, **options: Any) -> dict[str, int]:
    """The decoder's layers → bits of their blocks."""
    quantize(source, out, recipe=recipe, data=samples(), builtin=False, allow_loss=True, progress=told, **options)
    bundle = Bundle.load(out)
    graph = ir.load(bundle.listed(bundle.variant("decoder", "cpu").file)).graph
    return {str(n.name): n.attributes["bits"].as_int() for n in graph if n.op_type == "MatMulNBits"}


@pytest.mark.parametrize(("above", "gate", "more"), [(1e-6, None, True), (1e-6, 10.0, True), (10.0, None, False)])
def test_rounding_is_measured_first(source: Path, tmp_path: Path, above: float, gate: float | None, more: bool) -> None:
    told = Told()
    bits = quantized(source, tmp_path / "out", replace(INT4, more_bits_above=above), told, gate=Gate(gate))
    assert told.titles.index("measuring what rounding costs") < told.titles.index("calibrating the decoder")
    assert bool(told.notices) == more
    assert Bundle.load(tmp_path / "out").manifest.provenance["notices"] == told.notices
    eight = {name for name, b in bits.items() if b == 8 and name != "lm_head"}
    # The first of six layers is in the first tenth, rounded.
    expected = {f"layers.{i}.v_proj" for i in range(6)} | {f"layers.{i}.down_proj" for i in range(1, 6)}
    assert eight == (expected if more else set())


def test_a_gate_may_ask_for_less(source: Path, tmp_path: Path) -> None:
    bits = quantized(source, tmp_path / "out", replace(INT4, more_bits_above=10.0), Told(), gate=Gate(1e-6))
    assert bits["layers.3.v_proj"] == 8


def test_bits_that_are_fixed_stay(source: Path, tmp_path: Path) -> None:
    told = Told()
    bits = quantized(source, tmp_path / "out", replace(INT4, more_bits_above=None), told)
    assert {b for name, b in bits.items() if name != "lm_head"} == {4}
    assert "measuring what rounding costs" not in told.titles


def test_it_is_measured_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted quantization goes on with the bits that it began with; a note that cannot be read is made anew."""

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    recipe, told = replace(INT4, more_bits_above=1e-6), Told()
    with monkeypatch.context() as patch:
        patch.setattr(quantize_job, "calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(source, tmp_path / "out", recipe, told)
    note = tmp_path / ".out.calibration" / "rounding.json"
    assert json.loads(note.read_text(encoding="utf-8")) > 0
    with monkeypatch.context() as patch:
        patch.setattr(quantize_job, "of_rounding", stop)
        patch.setattr(quantize_job, "calibrate", lambda *a, **k: (_ for _ in ()).throw(EOFError))
        with pytest.raises(EOFError):
            quantized(source, tmp_path / "out", recipe, told)
    note.write_text("{", encoding="utf-8")
    assert quantized(source, tmp_path / "out", recipe, told)["layers.3.v_proj"] == 8


@pytest.mark.parametrize("gates", [(Gate(10.0, 1.0), Gate(1e-6)), (Gate(1e-6), Gate(10.0))])
def test_another_gate_may_ask_for_other_bits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gates: tuple[Gate, Gate]
) -> None:
    """What was found for other bits is found anew: the bundle is the one that the second gate alone would give."""

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    recipe = replace(INT4, more_bits_above=10.0)
    with monkeypatch.context() as patch:
        patch.setattr(quantize_job.QuantizeJob, "against_rounding", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(source, tmp_path / "again", recipe, Told(), gate=gates[0])
    for name in ("again", "fresh"):
        quantized(source, tmp_path / name, recipe, Told(), gate=gates[1])
    again, fresh = (Bundle.load(tmp_path / name).manifest for name in ("again", "fresh"))
    assert again.files["decoder.onnx.data"] == fresh.files["decoder.onnx.data"]
    assert again.accuracy["layers"] == fresh.accuracy["layers"]


@pytest.mark.parametrize("kind", [INT8_TOKEN, BLOCKS_8, FLOAT16])
def test_decoders_of_8_bits_are_not_measured(source: Path, tmp_path: Path, kind: Precision) -> None:
    told = Told()
    quantized(source, tmp_path / "out", replace(INT4, decoder=kind, more_bits_above=0.0), told)
    assert told.notices == []
    assert "measuring what rounding costs" not in told.titles


@pytest.mark.parametrize("demand", [(math.nan, None), (-1.0, None), (None, math.nan), (None, -0.5)])
def test_demands_that_are_no_numbers(demand: tuple[float | None, float | None]) -> None:
    with pytest.raises(OptionError, match=r"= (nan|-1.0|-0.5)\n.*0 or more"):
        Gate(*demand)


def test_own_rules_come_before() -> None:
    own = replace(INT4, rules=(Rule("decoder", "layers.2.*", FLOAT16),))
    more = with_more_bits(own, 20)
    kinds = {i: precision_of(more, "decoder", f"layers.{i}.down_proj") for i in (1, 2, 3, 19)}
    assert (kinds[1].bits, kinds[2].kind, kinds[3].bits, kinds[19].bits) == (4, "float16", 8, 8)
    assert precision_of(more, "decoder", "layers.3.experts.5.down_proj").bits == 8
    assert precision_of(more, "decoder", "layers.0.v_proj").bits == 8
    assert precision_of(more, "decoder", "layers.3.qk_proj").bits == 4
