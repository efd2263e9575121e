"""Attention masks on the host: what a token may not see, and how distance scores, as one additive bias."""

import math
from collections.abc import Sequence

import numpy as np

from mllm_edge.runtime.backends.base import HIDDEN

__all__ = ["RelativeBias", "attention_bias", "cross_bias", "encoder_bias"]


def attention_bias(
    pasts: np.ndarray, tokens: int, window: int | None = None, spans: np.ndarray | None = None
) -> np.ndarray:
    """Bias [B, 1, S, L] float32 for S new tokens of B sequences behind `pasts` [B] others, L = max(pasts) + S.

    0 where visible, else HIDDEN. A token sees itself and what came before, or with `window` only the latest `window` of
    these. `spans` [S]: new tokens with the same number > 0 see each other in both directions, whatever the window.
    """
    length = int(pasts.max()) + tokens
    queries = pasts[:, None, None] + np.arange(tokens)[:, None]
    keys = np.arange(length)
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    if spans is not None:
        same = (spans[:, None] == spans) & (spans > 0)
        for row, past in zip(visible, pasts, strict=True):
            row[:, past : past + tokens] |= same
    return np.where(visible, np.float32(0), np.float32(HIDDEN))[:, None]


def encoder_bias(tokens: int, relative: "RelativeBias | None" = None) -> np.ndarray:
    """Bias [1, 1 or heads, S, S] float32 of a text encoder, where every token sees every other."""
    return np.zeros((1, 1, tokens, tokens), np.float32) if relative is None else relative.both_ways(tokens)


def cross_bias(
    tokens: int, places: Sequence[int], shown: Sequence[int], features: int
) -> tuple[np.ndarray, np.ndarray]:
    """What each of `tokens` tokens sees of images whose tokens are at `places`, each of so many `features` of which the
    first `shown` are of the image: a bias [S, N] float32, and [S, 1] float32, 0 for tokens that see none, else 1.

    An image is seen from its token until the next image's; where several follow each other at once, until the one
    behind them all. The bias of tokens that see none hides nothing: the trained models compute it so.
    """
    bias = np.full((tokens, len(places) * features), HIDDEN, np.float32)
    ends = [*places[1:], tokens]
    for i in reversed(range(len(places))):
        if i + 1 < len(places) and places[i] + 1 == places[i + 1]:
            ends[i] = ends[i + 1]
        bias[places[i] : ends[i], i * features : i * features + shown[i]] = 0
    bias[: places[0]] = 0
    return bias, (np.arange(tokens)[:, None] >= places[0]).astype(np.float32)


class RelativeBias:
    """T5's scores of distances: `table` [buckets, heads], with distances from `max_distance` on in the last bucket.

    Half of the buckets are single distances, the others grow logarithmically (arXiv 1910.10683, section 2.1); an
    encoder splits them between the two directions.
    """

    def __init__(self, table: np.ndarray, max_distance: int):
        self._table, self._max_distance = table.astype(np.float32), max_distance

    def behind(self, pasts: np.ndarray, tokens: int) -> np.ndarray:
        """Scores [B, heads, S, L] of keys behind the query; those ahead, which a mask hides, score as distance 0."""
        keys = np.arange(int(pasts.max()) + tokens)
        distances = np.maximum(pasts[:, None, None] + np.arange(tokens)[:, None] - keys, 0)
        return self._scores(self._buckets(distances, len(self._table)))

    def both_ways(self, tokens: int) -> np.ndarray:
        """Scores [1, heads, S, S] of an encoder."""
        ahead = np.arange(tokens) - np.arange(tokens)[:, None]
        half = len(self._table) // 2
        return self._scores((self._buckets(np.abs(ahead), half) + np.where(ahead > 0, half, 0))[None])

    def _scores(self, buckets: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._table[buckets].transpose(0, 3, 1, 2))

    def _buckets(self, distances: np.ndarray, count: int) -> np.ndarray:
        exact = count // 2
        # In float32 and in this order, as the models were trained: a boundary decides between two buckets.
        ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
        grown = exact + (ratio / np.float32(math.log(self._max_distance / exact)) * (count - exact)).astype(np.int64)
        return np.where(distances < exact, distances, np.minimum(grown, count - 1))
