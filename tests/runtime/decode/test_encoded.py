"""A prompt as the decoder gets it: parts of it, and what comes behind."""

import numpy as np

from mllm_edge.runtime.decode.encoded import Encoded


def encoded(**fields: object) -> Encoded:
    return Encoded(np.arange(12, dtype=np.float32).reshape(3, 4), **fields)  # type: ignore[arg-type]


TEXT = np.ones((2, 4), np.float32)


def test_text_behind_plain_embeddings() -> None:
    whole = encoded().followed_by(TEXT)
    np.testing.assert_array_equal(whole.embeds, np.concatenate([encoded().embeds, TEXT]))
    assert whole.is_plain
    assert len(whole) == 5
    assert whole.end is None


def test_positions_go_on_behind_the_highest() -> None:
    whole = encoded(positions=np.array([0, 7, 2])).followed_by(TEXT)
    np.testing.assert_array_equal(whole.positions, [0, 7, 2, 8, 9])
    assert whole.end == 10
    axes = np.array([[0, 1, 1], [0, 1, 1], [0, 1, 4]])
    found = encoded(positions=axes).followed_by(TEXT)
    np.testing.assert_array_equal(found.positions, [[0, 1, 1, 5, 6], [0, 1, 1, 5, 6], [0, 1, 4, 5, 6]])
    np.testing.assert_array_equal(encoded(positions=axes).followed_by(TEXT[:0]).positions, axes)
    assert not found.is_plain


def test_text_is_in_no_span_and_looks_where_the_last_token_did() -> None:
    rows = {
        "deepstack.0": np.ones((3, 4), np.float32),
        "cross_attention_bias": np.array([[0, 0], [0, -9], [-9, 0]], np.float32),
        "cross_attention_rows": np.array([[0], [1], [1]], np.float32),
    }
    whole = encoded(spans=np.array([0, 1, 1]), per_token=rows).followed_by(TEXT)
    np.testing.assert_array_equal(whole.spans, [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(whole.per_token["deepstack.0"][3:], np.zeros((2, 4)))
    np.testing.assert_array_equal(whole.per_token["cross_attention_bias"][3:], [[-9, 0]] * 2)
    np.testing.assert_array_equal(whole.per_token["cross_attention_rows"][3:], [[1]] * 2)


def test_pieces_put_together_are_the_whole() -> None:
    seen = {"cross.0.key": np.zeros((1, 1, 2, 4), np.float32)}
    axes = np.arange(9).reshape(3, 3)
    whole = encoded(positions=axes, spans=np.array([0, 1, 1]), per_token={"deepstack.0": TEXT[[0, 1, 0]]}, cross=seen)
    parts = [whole.piece(slice(0, 1)), whole.piece(slice(1, None))]
    np.testing.assert_array_equal(np.concatenate([part.embeds for part in parts]), whole.embeds)
    np.testing.assert_array_equal(np.concatenate([part.positions for part in parts], axis=1), axes)
    np.testing.assert_array_equal(np.concatenate([part.spans for part in parts]), [0, 1, 1])
    assert [len(part.per_token["deepstack.0"]) for part in parts] == [1, 2]
    assert all(part.cross is seen for part in parts)
