"""The built-in calibration text: many kinds, each beginning of it a fair share, none of it what others measure with."""

import difflib
import unicodedata
from collections import Counter

from benchmarks.real_weights_texts import calibration_prompts, held_out_prompts
from mllm_edge.calibration.builtin import BUILTIN, builtin_samples
from mllm_edge.calibration.calibrate import held_apart


def test_questions_have_neither_images_nor_answers() -> None:
    samples = builtin_samples()
    assert len(samples) == BUILTIN == len({sample.prompt for sample in samples})
    assert all(not sample.images and sample.answer is None and sample.prompt.strip() for sample in samples)


def test_every_beginning_is_a_fair_share() -> None:
    whole = Counter(sample.where for sample in builtin_samples())
    for count in (16, 48, 96):
        first = builtin_samples(count)
        part = Counter(sample.where for sample in first)
        assert [s.prompt for s in first] == [s.prompt for s in builtin_samples()[:count]]
        assert all(abs(part[kind] - whole[kind] * count / BUILTIN) <= 1 for kind in whole)


def test_every_kind_is_judged_on_questions_held_apart() -> None:
    samples = builtin_samples()
    held = {sample.where for i, sample in enumerate(samples) if held_apart(i, len(samples))}
    assert held == {sample.where for sample in samples}


def test_a_dozen_languages() -> None:
    letters = "".join(sample.prompt for sample in builtin_samples())
    scripts = {unicodedata.name(c).split()[0] for c in letters if c.isalpha()}
    assert {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI"} <= scripts


def test_shares_no_question_with_those_that_judge() -> None:
    mine = [sample.prompt for sample in builtin_samples()]
    for other in (*held_out_prompts(quick=False), *calibration_prompts(1000)):
        assert max(difflib.SequenceMatcher(None, other, prompt).ratio() for prompt in mine) < 0.75, other
