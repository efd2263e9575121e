"""Long texts and photographs as benchmarks take them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import real_weights_photographs
from benchmarks.real_weights import compared
from benchmarks.real_weights_long import long_prompts
from benchmarks.real_weights_photographs import photographs


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A token for each word of a's and b's."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def test_questions_stand_behind_the_first_tokens(tokenizer: Tokenizer) -> None:
    texts = {"a b  a\nb ä b": ("Why?", "How?"), "b b b b b": ("Who?",)}
    assert long_prompts(tokenizer, texts, 5) == ["a b  a\nb ä\n\nWhy?", "a b  a\nb ä\n\nHow?", "b b b b b\n\nWho?"]


def test_a_text_that_is_too_short_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(SystemExit, match="--contexts 4: the text that begins with 'a b a' has 3 tokens"):
        long_prompts(tokenizer, {"a b a": ("Why?",)}, 4)


def test_divergence_and_agreement_are_over_all_tokens() -> None:
    sure, unsure = np.log([[0.75, 0.25]]), np.log([[0.25, 0.75]])
    assert compared([(sure, sure)]) == {"KL": 0, "agrees %": 100}
    found = compared([(np.repeat(sure, 3, axis=0),) * 2, (sure, unsure)])
    assert found == {"KL": pytest.approx(0.5 * np.log(3) / 4, abs=1e-4), "agrees %": 75}


def test_photographs_are_found_in_packages_that_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "skimage" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError")
    (folder / "cat.png").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert photographs({"skimage/data": ("cat.png",)}) == [folder / "cat.png"]
    with pytest.raises(SystemExit, match=r"scikit-image has other photographs: .*dog\.png is missing"):
        photographs({"skimage/data": ("cat.png", "dog.png")})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps scikit-learn"):
        photographs({"sklearn/datasets/images": ("china.jpg",)})


def test_no_photograph_calibrates_and_judges() -> None:
    calibrate, judge = (
        {(folder, file) for folder, files in names.items() for file in files}
        for names in (real_weights_photographs._CALIBRATES, real_weights_photographs._JUDGES)
    )
    assert len(calibrate) >= 5
    assert len(judge) >= 5
    assert not calibrate & judge
