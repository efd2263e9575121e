"""The sample model that ships: small enough, really trained, and the same through the bundle, token for token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_edge import VLM
from mllm_edge.export.pipeline import export

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "sample_vlm"
MODEL = SAMPLE / "model"
IMAGES = ROOT / "examples" / "images"
QUESTIONS = 120
# The scores to reach are 97 and 90 on 2,000 questions; this many answers fewer allow for a small draw.
EXPECTED = {"clean": 94.0, "hard": 86.0}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample model in float32 and with the default recipe."""
    folder = tmp_path_factory.mktemp("sample")
    for recipe in ("fp32", "int4"):
        export(str(MODEL), folder / recipe, recipe_name=recipe)
    return {recipe: folder / recipe for recipe in ("fp32", "int4")}


def evaluate(model: Path, split: str, folder: Path) -> tuple[dict, list[dict]]:
    """Scores and answers by the evaluation script."""
    scores, answers = folder / "scores.json", folder / "answers.jsonl"
    command = [sys.executable, str(SAMPLE / "evaluate.py"), str(model), "--set", split]
    command += ["--questions", str(QUESTIONS), "--json", str(scores), "--answers", str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(scores.read_text()), [json.loads(line) for line in answers.read_text().splitlines()]


@pytest.mark.parametrize("split", ["clean", "hard"])
def test_float32_bundle_answers_like_transformers_token_for_token(
    bundles: dict[str, Path], split: str, tmp_path: Path
) -> None:
    for name in ("source", "bundle"):
        (tmp_path / name).mkdir()
    scores, source = evaluate(MODEL, split, tmp_path / "source")
    _, bundle = evaluate(bundles["fp32"], split, tmp_path / "bundle")
    assert len(source) == QUESTIONS == scores["questions"]
    assert bundle == source
    assert scores["exact_match"] >= EXPECTED[split]


def test_int4_bundle_answers_nearly_as_well(bundles: dict[str, Path], tmp_path: Path) -> None:
    scores, _ = evaluate(bundles["int4"], "clean", tmp_path)
    assert scores["exact_match"] >= EXPECTED["clean"] - 2


def test_model_is_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 10_000_000


def test_example_images_are_answered(bundles: dict[str, Path]) -> None:
    asked = json.loads((IMAGES / "questions.json").read_text(encoding="utf-8"))
    assert len({entry["image"] for entry in asked}) >= 6
    with VLM.load(bundles["int4"]) as vlm:
        for entry in asked:
            result = vlm.generate(entry["question"], images=[IMAGES / entry["image"]], max_new_tokens=48)
            assert result.text.strip() == entry["answer"], entry
