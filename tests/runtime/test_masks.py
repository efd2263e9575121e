"""Causal and windowed biases."""

import numpy as np
import pytest

from mllm_edge.runtime.masks import HIDDEN, causal_bias


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 5), (4, 1), (3, 4)])
def test_bias_hides_the_future_and_what_left_the_window(past: int, tokens: int, window: int | None) -> None:
    bias = causal_bias(past, tokens, window)
    assert bias.shape == (1, 1, tokens, past + tokens)
    assert bias.dtype == np.float32
    for row in range(tokens):
        for column in range(past + tokens):
            position = past + row
            visible = column <= position and (window is None or position - column < window)
            assert bias[0, 0, row, column] == (0 if visible else HIDDEN)


def test_hidden_fits_half_precision() -> None:
    assert np.isfinite(np.float16(HIDDEN))
    assert np.exp(np.float16(HIDDEN)) == 0
