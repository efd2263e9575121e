"""Causal and windowed biases, blocks, and scores of distances."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from mllm_edge.runtime.backends.base import HIDDEN
from mllm_edge.runtime.decode.generate import chunks
from mllm_edge.runtime.decode.masks import RelativeBias, attention_bias, cross_bias, encoder_bias


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 5), (4, 1), (3, 4)])
def test_bias_hides_the_future_and_what_left_the_window(past: int, tokens: int, window: int | None) -> None:
    bias = attention_bias(np.array([past]), tokens, window)
    assert bias.shape == (1, 1, tokens, past + tokens)
    assert bias.dtype == np.float32
    for row in range(tokens):
        for column in range(past + tokens):
            position = past + row
            visible = column <= position and (window is None or position - column < window)
            assert bias[0, 0, row, column] == (0 if visible else HIDDEN)


def test_sequences_of_unequal_length_have_their_own_rows() -> None:
    bias = attention_bias(np.array([2, 0, 5]), 3, window=4)
    assert bias.shape == (3, 1, 3, 8)
    for row, past in zip(bias, (2, 0, 5), strict=True):
        alone = attention_bias(np.array([past]), 3, window=4)[0]
        np.testing.assert_array_equal(row[..., : past + 3], alone)
        assert (row[..., past + 3 :] == HIDDEN).all()


def test_blocks_see_each_other_in_both_directions() -> None:
    bias = attention_bias(np.array([2]), 6, window=2, spans=np.array([0, 1, 1, 1, 2, 0]))
    visible = (bias[0, 0] == 0).astype(int).tolist()
    assert visible == [
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_hidden_fits_half_precision() -> None:
    assert np.isfinite(np.float16(HIDDEN))
    assert np.exp(np.float16(HIDDEN)) == 0


def bucket(distance: int, count: int, furthest: int) -> int:
    """The bucket of one distance, from the definition: half exact, half logarithmic."""
    exact = count // 2
    if distance < exact:
        return distance
    return min(count - 1, exact + int(math.log(distance / exact) / math.log(furthest / exact) * (count - exact)))


def test_scores_of_distances_behind() -> None:
    table = np.arange(16, dtype=np.float32).reshape(8, 2)
    scores = RelativeBias(table, 20).behind(np.array([3, 30]), 2)
    assert scores.shape == (2, 2, 2, 32)
    for b, past in enumerate((3, 30)):
        for row in range(2):
            for key in range(past + row + 1):
                expected = table[bucket(past + row - key, 8, 20)]
                np.testing.assert_array_equal(scores[b, :, row, key], expected)


def test_scores_of_an_encoder_tell_the_directions_apart() -> None:
    table = np.arange(16, dtype=np.float32)[:, None]
    scores = encoder_bias(9, RelativeBias(table, 20))
    assert scores.shape == (1, 1, 9, 9)
    for query in range(9):
        for key in range(9):
            expected = bucket(abs(key - query), 8, 20) + (8 if key > query else 0)
            assert scores[0, 0, query, key] == expected
    assert not encoder_bias(4).any()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_chunks_cover_the_prompt_and_cut_no_block(runs: list[tuple[int, int]], size: int) -> None:
    """Each run is text (0) or a block of its own, so many tokens long."""
    parts = [np.full(length, number + 1 if kind else 0) for number, (kind, length) in enumerate(runs)]
    blocks = np.concatenate(parts)
    pieces = list(chunks(len(blocks), size, blocks))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(blocks)))
    longest = max(size, *(len(part) for part, (kind, _) in zip(parts, runs, strict=True) if kind), 0)
    for piece in pieces:
        assert piece.stop - piece.start <= longest
        if piece.stop < len(blocks):
            assert not (blocks[piece.stop] > 0 and blocks[piece.stop] == blocks[piece.stop - 1])


@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.data())
def test_what_is_seen_of_images_is_what_transformers_shows(images: list[bool], data: st.DataObject) -> None:
    features, tiles = 3, 4
    places = np.flatnonzero(images).tolist()
    counts = data.draw(st.lists(st.integers(1, tiles), min_size=len(places), max_size=len(places)))
    bias, rows = cross_bias(len(images), places, [n * features for n in counts], tiles * features)
    spans = get_cross_attention_token_mask([int(image) for image in images], 1)
    dense = convert_sparse_cross_attention_mask_to_dense([spans], [counts], tiles, len(images))[0]
    expected = dense.repeat(features, axis=2).reshape(len(images), -1)
    np.testing.assert_array_equal(rows[:, 0], expected.any(axis=1))
    hidden = (expected == 0) & expected.any(axis=1, keepdims=True)
    np.testing.assert_array_equal(bias, np.where(hidden, np.float32(HIDDEN), 0))
    assert bias.dtype == rows.dtype == np.float32
