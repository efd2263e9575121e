"""What a proof takes from its samples."""

from typing import Any

import numpy as np
import pytest

from mllm_edge.calibration import evaluate
from mllm_edge.calibration.data import Sample


@pytest.mark.parametrize(("says", "shown"), [([0, 0, 7, 8], 2), ([5, 6], 0), ([0, 0], 0)])
def test_the_sample_answer_is_one_that_says_something(
    monkeypatch: pytest.MonkeyPatch, says: list[int], shown: int
) -> None:
    monkeypatch.setattr(evaluate, "_text", lambda vlm, tokens: str(tokens[0]) if tokens[0] else "")
    tally, model = evaluate._Tally(), Any
    for i, word in enumerate(says):
        run = evaluate._Run({}, np.zeros((1, 4), np.float32), np.array([word]), 1.0, 1.0)
        tally.add(Sample(f"Question {i}?", (), None, ""), run, run, None, model, model)
    proof = tally.proof(1, 1)
    answer = str(says[shown]) if says[shown] else ""
    assert (proof.question, proof.answer_before, proof.answer_after) == (f"Question {shown}?", answer, answer)
