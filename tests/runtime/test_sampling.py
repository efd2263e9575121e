"""Sampling against the source library's logits processors, and its distribution, determinism and errors."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams


def logits_of(seed, size=97, scale=3.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def source_probabilities(params, prompt_ids, logits):
    """The source library's processors in its order, in float64."""
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
    steps = []
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def dense(sampler, logits):
    ids, probabilities = sampler.distribution(logits)
    assert probabilities.sum() == pytest.approx(1)
    out = np.zeros(len(logits))
    out[ids] = probabilities
    return out


CASES = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.6, "top_p": 0.05},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.5, "min_p": 1.0},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.8, "repetition_penalty": 0.5, "top_k": 10},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_probabilities_equal_the_source_library(case, seed):
    params = SamplingParams(**case)
    prompt_ids = [3, 9, 9, 50, seed]
    logits = logits_of(seed)
    expected = source_probabilities(params, prompt_ids, logits)
    actual = dense(Sampler(params, prompt_ids), logits)
    assert set(np.flatnonzero(actual)) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 3),
    st.integers(0, 30),
    st.integers(1, 1000).map(lambda n: n / 1000),
    st.integers(0, 1000).map(lambda n: n / 1000),
    st.floats(0.3, 3),
)
def test_any_combination_equals_the_source_library(seed, temperature, top_k, top_p, min_p, repetition_penalty):
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    logits = logits_of(seed, 60)
    expected = source_probabilities(params, [1, 2, 3], logits)
    actual = dense(Sampler(params, [1, 2, 3]), logits)
    # One token may fall on the other side of a threshold by rounding; then its probability says how far that is.
    different = set(np.flatnonzero(actual)) ^ set(np.flatnonzero(expected))
    if not different:
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    else:
        nudged = [dataclasses.replace(params, top_p=min(1.0, params.top_p * f), min_p=min(1.0, params.min_p * f))
                  for f in (1 - 1e-6, 1 + 1e-6)]  # fmt: skip
        kept = {frozenset(np.flatnonzero(dense(Sampler(near, [1, 2, 3]), logits))) for near in nudged}
        assert frozenset(np.flatnonzero(expected)) in kept


def test_ties_at_the_edge_of_top_k_stay():
    logits = np.array([1, 5, 3, 3, 3, 0], np.float32)
    params = SamplingParams(temperature=1.0, top_k=2)
    assert set(Sampler(params).distribution(logits)[0]) == {1, 2, 3, 4}
    np.testing.assert_allclose(dense(Sampler(params), logits), source_probabilities(params, [], logits), atol=1e-9)


def test_repetition_penalty_counts_generated_tokens():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.7)
    sampler = Sampler(params, [4])
    logits = logits_of(1)
    for token in (7, 8, 7):
        sampler.observe(token)
    expected = source_probabilities(params, [4, 7, 8, 7], logits)
    np.testing.assert_allclose(dense(sampler, logits), expected, atol=1e-6)


def test_frequency_and_presence_count_the_answer_only():
    params = SamplingParams(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25)
    sampler = Sampler(params, [0, 0, 1])
    for token in (2, 2, 2, 3):
        sampler.observe(token)
    logits = np.zeros(5, np.float32)
    expected = np.exp([0, 0, -3 * 0.5 - 0.25, -0.5 - 0.25, 0])
    np.testing.assert_allclose(dense(sampler, logits), expected / expected.sum(), atol=1e-7)


def test_repetition_comes_before_frequency():
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    sampler = Sampler(params)
    sampler.observe(0)
    # 5 / 2 − 1 = 1.5, whereas (5 − 1) / 2 would be 2.
    assert sampler.sample(np.array([5, 1.7], np.float32)) == 1


def test_image_tokens_beyond_the_logits_are_no_trouble():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5)
    logits = logits_of(2, 10)
    np.testing.assert_array_equal(
        dense(Sampler(params, [3, 11, 900]), logits), dense(Sampler(params, np.array([3], np.int64)), logits)
    )


# ---------------------------------------------------------------- greedy
def test_greedy_is_the_default_and_takes_the_first_of_equals():
    sampler = Sampler(SamplingParams(), [1])
    assert [sampler.sample(np.array(row, np.float32)) for row in ([0, 2, 1], [3, 3, 1], [-2, -np.inf, -1])] == [1, 0, 2]


def test_greedy_with_penalties_moves_on():
    sampler = Sampler(SamplingParams(presence_penalty=1.0))
    logits = np.array([1.0, 0.5, 0.2], np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [0, 1, 2]


def test_penalties_never_change_the_callers_logits():
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, repetition_penalty=1.5, frequency_penalty=1.0, top_k=3)
        logits = logits_of(3)
        logits.flags.writeable = False
        sampler = Sampler(params, [1, 2])
        for _ in range(4):
            sampler.sample(logits)


def test_greedy_equals_the_limit_of_small_temperatures():
    for seed in range(5):
        logits = logits_of(seed)
        assert Sampler(SamplingParams(temperature=1e-6, seed=0)).sample(logits) == int(np.argmax(logits))
    huge = np.array([1e30, -1e30, 0.0], np.float32)
    assert Sampler(SamplingParams(temperature=1e-6, seed=0)).sample(huge) == 0


# ---------------------------------------------------------------- drawing
@pytest.mark.parametrize(
    "case", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8}], ids=str
)
def test_drawn_tokens_follow_the_probabilities(case):
    params = SamplingParams(temperature=1.0, seed=7, **case)
    logits = logits_of(11, 12, 1.5)
    sampler = Sampler(params)
    draws = 6000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=12)
    expected = source_probabilities(params, [], logits)
    assert (counts[expected == 0] == 0).all()
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4.5 * spread + 1e-9).all()


def test_the_seed_decides():
    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.5, top_p=0.95, seed=seed))
        return [sampler.sample(logits_of(i)) for i in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_masked_tokens_are_never_drawn():
    logits = np.full(50, -np.inf, np.float32)
    logits[[3, 20]] = 1.0
    for case in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.01}):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **case))
        assert {sampler.sample(logits) for _ in range(200)} == {3, 20}


class Always:
    """A generator of one number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(("value", "token"), [(0.0, 1), (math.nextafter(1, 0), 2)])
def test_the_ends_of_the_interval(monkeypatch, value, token):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Always(value))
    logits = np.array([-np.inf, 0.0, 0.1, -np.inf], np.float32)
    assert Sampler(SamplingParams(temperature=1.0)).sample(logits) == token


# ---------------------------------------------------------------- errors and cost
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_wrong_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 40, 96])
def test_logits_that_are_not_finite(temperature, bad, place):
    logits = logits_of(0)
    logits[place] = bad
    for case in ({}, {"top_k": 3}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="logits contain NaN or infinity"):
            Sampler(SamplingParams(temperature=temperature, **case), [1]).sample(logits)


def test_logits_without_any_candidate():
    with pytest.raises(ValueError, match="logits"):
        Sampler(SamplingParams()).sample(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(1, 5), (0,), ()])
def test_logits_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match="one row"):
        Sampler(SamplingParams()).sample(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("case", "limit_ms"),
    [({}, 5), ({"temperature": 1.0, "top_k": 50}, 40), ({"temperature": 1.0, "top_p": 0.9}, 60)],
    ids=str,
)
def test_a_large_vocabulary_costs_little(case, limit_ms):
    logits = logits_of(5, 151_936)
    sampler = Sampler(SamplingParams(seed=0, **case))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        sampler.sample(logits)
        best = min(best, time.perf_counter() - start)
    assert best * 1e3 < limit_ms
