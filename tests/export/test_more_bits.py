"""A calibrated int4 whose rounding would cost too much keeps more bits where they matter most."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration import bits as bits_module
from mllm_edge.calibration import quantize_job
from mllm_edge.calibration.mixed import _FINER, bits_a_weight, spread, together, with_small_head
from mllm_edge.calibration.recipes import CALIBRATED, Recipe, Rule, precision_of
from mllm_edge.errors import OptionError, RecipeError
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import Gate, quantize
from mllm_edge.graph.precision import BLOCKS_8, CALIBRATED_4, EVENED_4, FLOAT16, HEAD_8, INT8_TOKEN, Precision
from mllm_edge.progress import Silent
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
    assert (8 in [b for name, b in bits.items() if name != "lm_head"]) == more
    assert more or bits["lm_head"] == 8


def test_a_gate_may_ask_for_less(source: Path, tmp_path: Path) -> None:
    recipe = replace(INT4, more_bits_above=10.0, most_bits=None)
    bits = quantized(source, tmp_path / "out", recipe, Told(), gate=Gate(1e-6))
    assert set(bits.values()) == {8}


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
        patch.setattr(bits_module, "shipped", stop)
        patch.setattr(quantize_job, "calibrate", lambda *a, **k: (_ for _ in ()).throw(EOFError))
        with pytest.raises(EOFError):
            quantized(source, tmp_path / "out", recipe, told)
    note.write_text("{", encoding="utf-8")
    bits = quantized(source, tmp_path / "out", recipe, told)
    assert {4, 8} == {b for name, b in bits.items() if name != "lm_head"}


@pytest.mark.parametrize("gates", [(Gate(10.0, 1.0), Gate(1e-6)), (Gate(1e-6), Gate(10.0))])
def test_another_gate_may_ask_for_other_bits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gates: tuple[Gate, Gate]
) -> None:
    """What was found for other bits is found anew: the bundle is the one that the second gate alone would give."""

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    recipe = replace(INT4, more_bits_above=10.0, most_bits=None)
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


def test_so_many_bits_at_most(source: Path, tmp_path: Path) -> None:
    """What costs most keeps 8 bits, as long as there is room; the manifest says which, and what they take."""
    stored = {layer.name: layer.shape for layer in quantize_job.layers_of(Bundle.load(source), "decoder")}
    taken, kept = [], []
    for most in (5.2, 6.0, 7.0, 20.0):
        out, told = tmp_path / str(most), Told()
        quantized(source, out, replace(INT4, more_bits_above=1e-6), told, most_bits=most)
        manifest = Bundle.load(out).manifest
        rules = [Rule(r["component"], r["layers"], Precision(**r["precision"])) for r in manifest.recipe["rules"]]
        recipe = replace(INT4, head=Precision(**manifest.recipe["head"]), rules=tuple(rules))
        found = {name: precision_of(recipe, "decoder", name) for name in stored}
        taken.append(bits_a_weight(recipe, stored))
        kept.append({name for name, precision in found.items() if precision.bits == 8})
        finer = [name for name, precision in found.items() if (precision.bits, precision.largest_block) == (4, 32)]
        assert taken[-1] <= most
        counts = {"keep 8 bits": len(kept[-1]), "have blocks of 32": len(finer)}
        words = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        assert told.notices[0].endswith(
            f": of the decoder's {len(stored)} layers those that cost most have more bits: {words} "
            f"({taken[-1]:.2f} bits a weight)"
        )
    assert taken == sorted(taken)
    assert kept[-1] == set(stored)


def test_few_bits_are_kept_to_where_rounding_costs_little(source: Path, tmp_path: Path) -> None:
    """As four bits with a head in 8 take more than that, the head gives way."""
    shapes = {layer.name: layer.shape for layer in quantize_job.layers_of(Bundle.load(source), "decoder")}
    recipe, most = replace(INT4, more_bits_above=10.0), bits_a_weight(INT4, shapes)
    assert quantized(source, tmp_path / "out", recipe, Told(), most_bits=most - 0.01)["lm_head"] == 4
    assert quantized(source, tmp_path / "more", recipe, Told(), most_bits=most)["lm_head"] == 8


@pytest.mark.parametrize(
    ("recipe", "bits", "what"),
    [
        (INT4, 3.5, r"most_bits = 3.5, and the decoder takes 4\.\d\d bits a weight with 4 bits in every layer"),
        (INT4, math.nan, "most_bits = nan"),
        (INT4, 0, "most_bits = 0"),
        ("int8", 6.0, "most_bits = 6, and recipe int8 gives every layer the bits that stand in it"),
        (replace(INT4, more_bits_above=None), 6.0, "most_bits = 6, and recipe int4 gives"),
    ],
)
def test_bits_that_cannot_be(source: Path, tmp_path: Path, recipe: Recipe | str, bits: float, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        quantize(source, tmp_path / "out", recipe=recipe, data=samples(), most_bits=bits)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_decoders_too_large_to_measure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_module, "affordable", lambda units, parameters: 0)
    with pytest.raises(RecipeError, match="too large to measure which layers need more bits"):
        quantize(source, tmp_path / "out", recipe=replace(INT4, more_bits_above=1e-6), data=samples())


SHAPES = {
    **{f"layers.{i}.{kind}": (64, 64) for i in range(6) for kind in ("v_proj", "down_proj")},
    "lm_head": (640, 64),
}


def test_what_is_measured_together() -> None:
    units = together(SHAPES)
    assert units[0] == ("layers.0.v_proj",)
    assert len(units) == 2 * 6 + 1
    assert units[-1] == ("lm_head",)
    assert together(f"layers.{i}.v_proj" for i in range(13))[1:3] == [
        ("layers.3.v_proj", "layers.4.v_proj"),
        ("layers.5.v_proj", "layers.6.v_proj"),
    ]
    assert together(["layers.0.experts.0.down_proj", "layers.0.experts.1.down_proj", "layers.2.v_proj"]) == [
        ("layers.0.experts.0.down_proj", "layers.0.experts.1.down_proj"),
        ("layers.2.v_proj",),
    ]


def test_a_byte_goes_where_it_saves_most() -> None:
    """Not to what costs most: the head is larger than all others together."""
    units = together(SHAPES)
    losses = {unit: 0.005 if unit[0].endswith("down_proj") else 0.01 for unit in units} | {("lm_head",): 0.04}
    small = with_small_head(INT4)
    assert small.head == replace(HEAD_8, bits=4, method="gptq")
    assert with_small_head(replace(INT4, decoder=EVENED_4)).head.method == "evened"
    assert with_small_head(replace(INT4, head=FLOAT16)).head == FLOAT16
    values = {name for name in SHAPES if name.endswith("v_proj")}
    raised = spread(small, SHAPES, losses, 0.0701, math.inf)
    found = {rule.layers: rule.precision for rule in raised.rules}
    # Blocks of 32 in the place of 64 save a fifth for an eighth of the bytes that 8 bits take.
    assert {name for name, precision in found.items() if precision.bits == 8} <= values
    assert all(p == BLOCKS_8 or p == replace(CALIBRATED_4, largest_block=32) for p in found.values())
    assert values <= found.keys()
    assert (raised.more_bits_above, raised.most_bits) == (None, None)
    exact = spread(small, SHAPES, losses, 0.0, math.inf)
    assert exact.head == HEAD_8
    assert {rule.precision for rule in exact.rules} == {BLOCKS_8}
    # Where a unit is too large, smaller ones may still have room.
    room = bits_a_weight(small, SHAPES) + 0.2
    tight = spread(small, SHAPES, losses | {("lm_head",): 10.0}, 0.0, room)
    assert tight.head == small.head
    assert tight.rules
    assert bits_a_weight(tight, SHAPES) <= room


def test_the_least_loss_for_the_bytes() -> None:
    """Beside every other choice of blocks of 32 and 8 bits for so few parts."""
    shapes = {"layers.0.v_proj": (64, 256), "layers.0.up_proj": (256, 256), "layers.0.down_proj": (256, 128)}
    losses = {(name,): loss for name, loss in zip(shapes, (0.3, 0.2, 0.25), strict=True)}
    base = replace(INT4, more_bits_above=None)
    choices = (0, 32, 8)

    def loss(recipe: Recipe) -> float:
        found = {name: precision_of(recipe, "decoder", name) for name in shapes}
        left = {
            name: 0.0 if p.bits == 8 else _FINER[128] if p.largest_block == 32 else 1.0 for name, p in found.items()
        }
        return sum(left[name] * losses[(name,)] for name in shapes)

    for most in np.linspace(4.3, 8.3, 9):
        best = min(
            loss(chosen)
            for way in itertools.product(choices, repeat=3)
            if bits_a_weight(chosen := _given(base, dict(zip(shapes, way, strict=True))), shapes) <= most
        )
        found = spread(base, shapes, losses, 0.0, most)
        assert bits_a_weight(found, shapes) <= most
        assert loss(found) <= 1.35 * best + 1e-9  # a part is taken whole, or not at all


@pytest.mark.parametrize(("decoder", "bits"), [(EVENED_4, 4), (CALIBRATED_4, 8)])
def test_blocks_of_32_save_more_of_what_is_only_rounded(decoder: Precision, bits: int) -> None:
    """0.56 of the loss is left then, 0.7 of what is calibrated."""
    name = "layers.0.down_proj"
    found = spread(replace(INT4, decoder=decoder), {name: (64, 128)}, {(name,): 0.1}, 0.06, math.inf)
    assert precision_of(found, "decoder", name).bits == bits


def _given(recipe: Recipe, ways: dict[str, int]) -> Recipe:
    precisions = {32: replace(CALIBRATED_4, largest_block=32), 8: BLOCKS_8}
    rules = tuple(Rule("decoder", name, precisions[way]) for name, way in ways.items() if way)
    return replace(recipe, rules=rules)


def test_own_rules_come_before(source: Path, tmp_path: Path) -> None:
    own = replace(INT4, more_bits_above=1e-6, most_bits=None, rules=(Rule("decoder", "layers.2.*", FLOAT16),))
    bits = quantized(source, tmp_path / "out", own, Told())
    assert not [name for name in bits if name.startswith("layers.2.")]
    assert set(bits.values()) == {8}
    rules = Bundle.load(tmp_path / "out").manifest.recipe["rules"]
    assert rules[-1]["layers"] == "layers.2.*"
    assert not [rule for rule in rules[:-1] if rule["layers"].startswith("layers.2.")]
