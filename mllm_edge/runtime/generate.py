"""The decode loop over ids: prefill once, then a token a step, or several where guesses come true."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from mllm_edge.runtime.best import Best
from mllm_edge.runtime.decoder import Decoder
from mllm_edge.runtime.sampling import Sampler
from mllm_edge.runtime.speculation import Guesser
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import EmbeddingSpec

__all__ = ["Embedder", "chunks", "generate"]

# A longer prompt is fed in pieces, so that attention scores stay small; shorter ones run in one piece.
PREFILL_CHUNK = 1024


def chunks(tokens: int, size: int, blocks: np.ndarray | None = None) -> Iterator[slice]:
    """Consecutive pieces of a prompt, of `size` tokens at most unless a block is larger: what sees each other in both
    directions must come at once."""
    start = 0
    while start < tokens:
        end = min(start + size, tokens)
        if blocks is not None and end < tokens:
            end = _whole_blocks(blocks, start, end)
        yield slice(start, end)
        start = end


def _whole_blocks(blocks: np.ndarray, start: int, end: int) -> int:
    """The nearest end before `end` that cuts no block, or the one behind it when a block fills the piece."""
    if blocks[end] == 0 or blocks[end] != blocks[end - 1]:
        return end
    inside = np.flatnonzero(blocks == blocks[end])
    return int(inside[0]) if inside[0] > start else int(inside[-1]) + 1


class Embedder:
    """Rows of the token embeddings [rows, H], as float32.

    A memory-mapped table is read row by row from its file: a page touched in a mapping brings its neighbours along, and
    they count as memory of this process (65 kB for a row of 3 kB). `touch(start, stop)` is told the bytes of the file
    that are going to be read, and raises when they are damaged.
    """

    def __init__(
        self, table: np.ndarray, spec: EmbeddingSpec, touch: Callable[[int, int], None] = lambda start, stop: None
    ):
        self._table, self._scale, self._touch = table, np.float32(spec.scale), touch
        mapped = isinstance(table, np.memmap) and table.filename is not None and hasattr(os, "pread")
        self._file = open(table.filename, "rb") if mapped else None  # type: ignore[attr-defined]  # noqa: SIM115

    def __call__(self, token_ids: np.ndarray) -> np.ndarray:
        """Embeddings [S, H] float32 of ids [S]."""
        if isinstance(self._table, np.memmap):
            self._check(token_ids)
        rows = (self._table[token_ids] if self._file is None else self._read(token_ids)).astype(np.float32)
        return rows if self._scale == 1 else rows * self._scale

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards."""
        if self._file is not None:
            self._file.close()

    def _check(self, token_ids: np.ndarray) -> None:
        size, begin = self._table.strides[0], self._table.offset  # type: ignore[attr-defined]
        for i in token_ids.tolist():
            place = begin + (i % len(self._table)) * size
            self._touch(place, place + size)

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        assert self._file is not None
        table, size = self._table, self._table.strides[0]
        data = bytearray()
        for i in token_ids.tolist():
            if not -len(table) <= i < len(table):
                raise IndexError(f"token {i} of {len(table)}")
            place = table.offset + (i % len(table)) * size  # type: ignore[attr-defined]
            data += os.pread(self._file.fileno(), size, place)
        return np.frombuffer(data, table.dtype).reshape(len(token_ids), table.shape[1])


def generate(
    decoder: Decoder,
    embed: Embedder,
    prompt_embeds: np.ndarray,
    sampler: Sampler,
    stop_ids: Collection[int],
    max_new_tokens: int,
    trace: Trace,
    blocks: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    guesser: Guesser | None = None,
) -> Iterator[int]:
    """Yield token ids until a stop id (which is not yielded) or `max_new_tokens`.

    `prompt_embeds` [S, H] float32 is appended to what the decoder's cache holds; the cache must have room for
    S + max_new_tokens − 1 positions. `blocks` [S] and `positions` [S] or [3, S] are as in `Decoder.forward`; a block is
    never cut. At each token the cache holds all before it. Spans: prefill, first_token, then decode per step and sample
    per token.

    `guesser`: a step also runs what it guesses, and tokens that come as guessed take no step of their own. The sampler
    sees the same rows of logits in the same order (but for rounding, which may differ with a step's width), so the
    tokens are the same. Counts: `guessed` tokens, and those `accepted`.
    """
    with trace.span("prefill"):
        cache = decoder.cache
        assert cache is not None, "reset() comes first"
        # Where the sampler needs no more of them than the session finds, the logits stay on the device.
        few = sampler.needs is not None and sampler.needs < decoder.best
        step = decoder.forward_best if few else decoder.forward
        length = cache.length + len(prompt_embeds) if positions is None else int(positions.max()) + 1
        for piece in chunks(len(prompt_embeds), PREFILL_CHUNK, blocks):
            together = None if blocks is None else blocks[piece]
            where = None if positions is None else positions[..., piece]
            logits = step(prompt_embeds[piece], where, length, blocks=together)
    produced, guess = 0, list[int]()
    rows: Sequence[np.ndarray | Best] | np.ndarray = [logits]
    while True:
        for row, guessed in zip(rows, [*guess, None], strict=True):
            with trace.span("sample" if produced else "first_token"):
                token = sampler.sample(row)
            if token in stop_ids:
                return
            produced += 1
            if guesser is not None:
                guesser.observe(token)
            yield token
            if produced == max_new_tokens:
                return
            if token != guessed:
                break
            cache.extend(1)
            trace.count("accepted")
        with trace.span("decode"):
            guess = [] if guesser is None else _guess(guesser, decoder, stop_ids, max_new_tokens - produced - 1)
            embeds = embed(np.array([token, *guess]))
            if not guess:
                rows = [step(embeds)]
                continue
            trace.count("guessed", len(guess))
            held = cache.length + 1
            rows = (decoder.best_rows if few else decoder.forward)(embeds, rows=range(len(embeds)))
            cache.truncate(held)  # what was guessed counts when it has come true


def _guess(guesser: Guesser, decoder: Decoder, stop_ids: Collection[int], count: int) -> list[int]:
    """What to check in the next step, `count` tokens at most; nothing behind a stop id."""
    guess = guesser.guess(min(count, decoder.rows - 1))
    guess = guess[: next((i for i, token in enumerate(guess) if token in stop_ids), len(guess))]
    return guess if decoder.turns_alike(1 + len(guess)) else []
