"""Streaming statistics equal those of all rows at once."""

import numpy as np
import pytest

from mllm_edge.calibration.calibrate import row_weights
from mllm_edge.calibration.statistics import Histogram, InputStatistics


def test_pieces_give_what_the_whole_gives() -> None:
    random = np.random.default_rng(0)
    x = (random.standard_normal((5000, 24)) * np.linspace(0.1, 9, 24)).astype(np.float32)
    statistics = InputStatistics(24, with_gram=True)
    for part in np.split(x, [1, 17, 900, 4999]):
        statistics.add(part.reshape(1, *part.shape))
    assert statistics.rows == 5000
    np.testing.assert_array_equal(statistics.channel_low, x.min(axis=0))
    np.testing.assert_array_equal(statistics.channel_max, np.abs(x).max(axis=0))
    np.testing.assert_allclose(statistics.channel_mean, np.abs(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.gram, x.T @ x / 5000, rtol=1e-3, atol=1e-3)
    assert statistics.histogram.counts.sum() == x.size


def test_sample_is_spread_over_all_rows() -> None:
    statistics = InputStatistics(1)
    for start in range(0, 40_000, 500):
        statistics.add(np.arange(start, start + 500, dtype=np.float32)[:, None])
    sample = statistics.sample[:, 0]
    assert 256 <= len(sample) <= 512
    assert len(set(np.diff(sample))) == 1
    assert sample[-1] > 39_000


def test_histogram_grows_without_losing_a_count() -> None:
    values = np.random.default_rng(1).standard_normal(20_000)
    once, grown = Histogram(), Histogram()
    grown.add(np.array([0.01]))
    for part in np.array_split(values, 9):
        grown.add(part)
    once.add(np.append(values, 0.01))
    assert grown.counts.sum() == once.counts.sum() == 20_001
    centres = (grown.edges[:-1] + grown.edges[1:]) / 2
    assert np.average(centres**2, weights=grown.counts) == pytest.approx(np.mean(values**2), rel=0.01)


def test_values_that_are_not_finite_are_refused() -> None:
    statistics = InputStatistics(2)
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(np.array([[1.0, np.nan]]))


def test_rows_of_the_answer_count_as_much_as_the_prompt() -> None:
    x = np.random.default_rng(0).standard_normal((1, 8, 4)).astype(np.float32)
    inputs = {"inputs_embeds": np.zeros((1, 8, 16), np.float32), "logits_indices": np.array([[6, 7]])}
    statistics = InputStatistics(4, with_gram=True)
    statistics.add(x, row_weights(inputs, x))
    prompt, answer = x[0, :6], x[0, 6:]
    expected = (prompt.T @ prompt / 6 + answer.T @ answer / 2) / 2
    np.testing.assert_allclose(statistics.gram, expected, rtol=1e-5)
    assert row_weights(inputs, answer[None]) is None  # the head's input: rows of the answer alone
    assert row_weights({"pixel_values": x}, x) is None


def test_drift_is_told_from_the_exact_inputs() -> None:
    random = np.random.default_rng(2)
    exact, x = random.standard_normal((2, 60, 5)).astype(np.float32)
    weights = np.linspace(0.5, 1.5, 60, dtype=np.float32)
    statistics = InputStatistics(5, with_gram=True)
    for rows in (slice(0, 7), slice(7, 60)):
        statistics.add(x[rows], weights[rows], exact=exact[rows].reshape(1, -1, 5))
    assert statistics.drift is not None
    np.testing.assert_allclose(statistics.drift, (exact - x).T @ (x * weights[:, None]) / 60, atol=1e-5)
    alike = InputStatistics(5, with_gram=True)
    alike.add(x)
    assert alike.drift is None


def test_rows_held_apart_are_in_nothing_that_is_fitted() -> None:
    random = np.random.default_rng(0)
    fitted, held = (random.standard_normal((n, 5)).astype(np.float32) for n in (40, 12))
    weights = np.linspace(0.5, 1.5, 12).astype(np.float32)
    alone, both = InputStatistics(5, with_gram=True), InputStatistics(5, with_gram=True)
    alone.add(fitted, None, fitted + 1)
    both.add(fitted, None, fitted + 1)
    both.add(held, weights, held - 1, held=True)
    np.testing.assert_array_equal(both.gram, alone.gram)
    np.testing.assert_array_equal(both.drift, alone.drift)
    np.testing.assert_array_equal(both.sample, alone.sample)
    assert (both.rows, both.fitted_rows, alone.held) == (52, 40, None)
    assert both.held is not None
    np.testing.assert_array_equal(both.held.x, held)
    np.testing.assert_array_equal(both.held.exact, held - 1)
    np.testing.assert_array_equal(both.held.weights, weights)


def test_rows_that_do_not_count_judge_nothing() -> None:
    statistics = InputStatistics(3)
    statistics.add(np.ones((4, 3), np.float32), np.zeros(4, np.float32), held=True)
    assert statistics.held is None


def test_rows_held_apart_stay_few_and_spread() -> None:
    """Whatever comes in, as many as have room; a row's exact values and its weight stay with it."""
    statistics = InputStatistics(2, held_bytes=8 * 1500)
    for start in range(0, 20_000, 700):
        rows = np.arange(start, start + 700, dtype=np.float32)
        statistics.add(np.stack([rows, -rows], axis=1), rows + 1, np.stack([2 * rows, rows], axis=1), held=True)
        assert sum(x.nbytes for x, _, _ in statistics._held) <= 8 * 1500
    held = statistics.held
    assert held is not None
    first = held.x[:, 0]
    assert 512 <= len(first) <= 1024
    assert len(set(np.diff(first))) == 1
    assert first[-1] > 19_000
    np.testing.assert_array_equal(held.exact[:, 0], 2 * first)
    np.testing.assert_array_equal(held.weights, first + 1)
