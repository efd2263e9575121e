"""The sample model, quantized in several ways: answers on held-out questions, divergence, size."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report
from mllm_edge.bundle import MANIFEST
from mllm_edge.calibration.recipes import CALIBRATED, Recipe
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import FIGURE, quantize
from mllm_edge.graph.precision import FLOAT16, HEAD_8, Precision
from mllm_edge.runtime.vlm import VLM

__all__ = ["add", "add_text_only"]

_EXAMPLE = Path(__file__).parents[1] / "examples" / "sample_vlm"
# Few answers differ by much: below thousands of positions the mean divergence is noise.
_CALIBRATION, _PROOF = 1024, 2048
_RESAMPLES = 2000
_RTN_4, _BEST_4 = Precision("blocks", 4), Precision("blocks", 4, method="awq+gptq")


def _everywhere(name: str, precision: Precision, head: Precision = HEAD_8) -> Recipe:
    return Recipe(name, precision, precision, precision, head)


def _decoder(name: str, bits: int, method: Any) -> Recipe:
    return Recipe(name, FLOAT16, FLOAT16, Precision("blocks", bits, method=method), HEAD_8)


# Rounding first, the calibrated twin behind it.
RECIPES: dict[str, Recipe] = {
    "int8": CALIBRATED["int8"],
    "int4": CALIBRATED["int4"],
    "int4 tower too, rounded": _everywhere("rounded", _RTN_4),
    "int4 tower too": _everywhere("calibrated", _BEST_4),
    "int3 decoder, rounded": _decoder("int3-rtn", 3, "rtn"),
    "int3 decoder": _decoder("int3", 3, "awq+gptq"),
    "int2 decoder, rounded": _decoder("int2-rtn", 2, "rtn"),
    "int2 decoder": _decoder("int2", 2, "gptq"),  # AWQ's scales cost more than they save at four levels
    "mixed": CALIBRATED["mixed"],
}


def add(report: Report, folder: Path, questions: int) -> None:
    """Every recipe on the hard set: exact match with a paired bootstrap interval, KL, top-1 flips, size."""
    source = _float(folder)
    data = calibration_data()
    asked = list(_questions("hard", questions))
    truth = _answers(source, asked)
    half = _nbytes(source)
    report.row(_row("float", truth, truth, None, half, half))
    rows = {}
    for name, recipe in RECIPES.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        proof = quantize(source, out, recipe=recipe, data=data, held_back=_PROOF, allow_loss=True).proof
        rows[name] = _row(name, truth, _answers(out, asked), proof, _nbytes(out), half)
        report.row(rows[name])
    lost = {name: -float(row["points"]) for name, row in rows.items()}
    report.at_most("sample_int8: points lost", lost["int8"], 0.5)
    report.at_most("sample_int4: points lost, tower too", lost["int4 tower too"], 1.0)
    for part in ("int4 tower too", "int3 decoder", "int2 decoder"):
        ratio = rows[part]["KL"] / rows[f"{part}, rounded"]["KL"]
        report.at_most(f"sample_int4_kl: {part}, over rounding", ratio, 0.5)
    report.at_most("sample_mixed: points lost", lost["mixed"], 0.3)
    report.at_most("sample_mixed: part of the fp16 size", rows["mixed"]["size"], 0.4)


def add_text_only(report: Report, folder: Path, questions: int) -> None:
    """The decoder in int4 and int3, calibrated on images with questions, and on the same questions without images."""
    source = _float(folder)
    data = calibration_data()
    texts = [{"prompt": item["prompt"], "answer": item["answer"]} for item in data]
    for bits in (4, 3):
        for name, samples in (("images and text", data), ("text alone", texts)):
            out = folder / f"{bits}-{name.replace(' ', '-')}"
            recipe = _decoder(name, bits, "awq+gptq")
            quantize(source, out, recipe=recipe, data=samples, held_back=_PROOF, allow_loss=True)
            proof = _proof(source, out, data)
            report.row({"decoder": f"int{bits}", "calibrated on": name, "KL": proof.kl, "top-1": proof.top1})
        ratio = report.rows[-1]["KL"] / report.rows[-2]["KL"]
        report.at_least(f"text_only: int{bits}, KL over that with images", ratio, 0.0)


def calibration_data(count: int = _CALIBRATION + _PROOF) -> list[dict[str, Any]]:
    """Questions about scenes that no evaluation holds, clean and hard by turns."""
    _scenes()
    from make_calibration import samples  # type: ignore[import-not-found]

    return [{"images": [picture], "prompt": q.question, "answer": q.answer} for _, picture, q in samples(count)]


def _float(folder: Path) -> Path:
    out = folder / "float"
    if not out.exists():
        export(str(_EXAMPLE / "model"), out, recipe_name="fp16", verify_mode="off")
    return out


def _scenes() -> Any:
    sys.path.insert(0, str(_EXAMPLE))
    import scenes

    return scenes


def _questions(split: str, count: int) -> Iterator[tuple[Any, str, str]]:
    scenes = _scenes()
    from questions import held_out

    last, picture = -1, None
    for index, scene, question in held_out(split, count):
        if index != last:
            last, picture = index, scenes.render(scene)
        yield picture, question.question, question.answer


def _answers(bundle: Path, asked: Sequence[tuple[Any, str, str]]) -> np.ndarray:
    """Whether each answer is right, word for word."""
    with VLM.load(bundle) as vlm:
        return np.array([vlm.generate(q, [image], max_new_tokens=48).text.strip() == a for image, q, a in asked])


def _proof(source: Path, out: Path, data: Sequence[Any]) -> Any:
    from mllm_edge.calibration.data import load_samples, split
    from mllm_edge.calibration.evaluate import prove

    return prove(source, out, split(load_samples(data), _PROOF)[1])


def _row(name: str, truth: np.ndarray, right: np.ndarray, proof: Any, nbytes: int, half: int) -> dict[str, Any]:
    low, high = _interval(truth, right)
    return {
        "sample model": name,
        "right %": 100 * float(right.mean()),
        "points": 100 * float(right.mean() - truth.mean()),
        "95% from": low,
        "to": high,
        "KL": proof.kl if proof else 0.0,
        "top-1 flips %": 100 * (1 - proof.top1) if proof else 0.0,
        "size": nbytes / half,
    }


def _interval(truth: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the difference in points: questions drawn again and again, both answers together."""
    difference = 100.0 * (right.astype(float) - truth.astype(float))
    random = np.random.default_rng(0)
    means = [difference[random.integers(0, len(difference), len(difference))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _nbytes(bundle: Path) -> int:
    """Of what runs: neither the manifest nor the picture of the errors."""
    return sum(p.stat().st_size for p in bundle.iterdir() if p.name not in (MANIFEST, FIGURE))
