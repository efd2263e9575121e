"""The decode loop over ids: prefill once, then a token a step, or several where guesses come true."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mllm_edge.runtime.backends.top_logits import Best
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.sampling import Sampler
from mllm_edge.runtime.decode.speculation import Guesser
from mllm_edge.runtime.limits import PREFILL_CHUNK
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.trace import Trace

__all__ = ["chunks", "generate"]


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
