"""The decode loop over ids: prefill once, then a token a step, or several where guesses come true."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.sampling import Sampler
from mllm_edge.runtime.decode.scores import Scoring
from mllm_edge.runtime.decode.speculation import Guesser, check_speculation
from mllm_edge.runtime.limits import MOST_ROWS, PREFILL_CHUNK
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.trace import Trace

__all__ = ["chunks", "generate", "prefill"]


def chunks(tokens: int, size: int, spans: np.ndarray | None = None, deepest: int | None = None) -> Iterator[slice]:
    """Consecutive pieces of a prompt, of `size` tokens at most unless a span is larger: what sees each other in both
    directions must come at once. `deepest`: the last place where a piece of more than MOST_ROWS tokens may begin."""
    start = 0
    while start < tokens:
        end = min(start + size, tokens)
        if deepest is not None and start + (tokens - 1 - start) // size * size > deepest:
            # The last piece would begin too far behind: a shorter one comes first, or there are short ones only.
            end = start + ((tokens - start) % size or size) if start <= deepest else min(start + MOST_ROWS, tokens)
        if spans is not None and end < tokens:
            end = _whole_spans(spans, start, end)
        yield slice(start, end)
        start = end


def _whole_spans(spans: np.ndarray, start: int, end: int) -> int:
    """The nearest end before `end` that cuts no span, or the one behind it when a span fills the piece."""
    if spans[end] == 0 or spans[end] != spans[end - 1]:
        return end
    inside = np.flatnonzero(spans == spans[end])
    return int(inside[0]) if inside[0] > start else int(inside[-1]) + 1


def prefill(
    decoder: Decoder, prompt: Encoded, length: int, trace: Trace, top: bool = False
) -> Sequence[np.ndarray | TopLogits]:
    """Append a prompt, or a part of it, in chunks, each a span; the last token's logits, or the `top` of them.
    `length`: see `Decoder.forward`."""
    cache, rows = decoder.cache, list[np.ndarray | TopLogits]()
    assert cache is not None, "reset() comes first"
    deepest = None if decoder.deepest is None else decoder.deepest - cache.length
    for piece in chunks(len(prompt), PREFILL_CHUNK, prompt.spans, deepest):
        trace.check()
        with trace.span("prefill"):
            part = prompt.piece(piece)
            rows = [*decoder.top_logits(part, length)] if top else [decoder.forward(part, length)]
    return rows


def generate(
    decoder: Decoder,
    embed: Embedder,
    prompt: Encoded,
    sampler: Sampler | Scoring,
    stop_ids: Collection[int],
    max_new_tokens: int,
    trace: Trace,
    guesser: Guesser | None = None,
) -> Iterator[int]:
    """Yield token ids until a stop id (which is not yielded), the sampler's end or `max_new_tokens`.

    `prompt`, of S tokens, is appended to what the decoder's cache holds; the cache must have room for
    S + max_new_tokens − 1 positions. At each token the cache holds all before it. Trace: prefill, first_token, then
    decode per step and sample per token.

    `guesser`: a step also runs what it guesses, and tokens that come as guessed take no step of their own. The sampler
    sees the same rows of logits in the same order (but for rounding, which may differ with a step's width), so the
    tokens are the same. Rows that the sampler does not look at are not projected. Counts: `guessed` tokens, and those
    `accepted`. Raises OptionError where the decoder's state cannot be taken back.
    """
    check_speculation(int(guesser is not None), decoder.rewindable)
    rows: Sequence[np.ndarray | TopLogits | None] | np.ndarray
    cache = decoder.cache
    assert cache is not None, "reset() comes first"
    # Where the sampler needs no more of them than the session finds, the logits stay on the device.
    top_suffices = sampler.needs is not None and sampler.needs < decoder.top
    length = cache.length + len(prompt) if prompt.end is None else prompt.end
    rows = prefill(decoder, prompt, length, trace, top_suffices)
    produced, guess = 0, list[int]()
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
            if produced == max_new_tokens or sampler.ended:
                return
            if token != guessed:
                break
            cache.extend(1)
            trace.count("accepted")
        trace.check()
        with trace.span("decode"):
            guess = [] if guesser is None else _guess(guesser, decoder, stop_ids, max_new_tokens - produced - 1)
            embeds = embed(np.array([token, *guess]))
            if not guess:
                rows = decoder.top_logits(embeds) if top_suffices else [decoder.forward(embeds)]
                continue
            trace.count("guessed", len(guess))
            held, certain = cache.length + 1, sampler.certain(guess)
            project = range(certain, len(embeds))
            found = (decoder.top_logits if top_suffices else decoder.forward)(embeds, project=project)
            rows = [*[None] * certain, *found]
            cache.truncate(held)  # what was guessed counts when it has come true


def _guess(guesser: Guesser, decoder: Decoder, stop_ids: Collection[int], count: int) -> list[int]:
    """What to check in the next step, `count` tokens at most; nothing behind a stop id."""
    guess = guesser.guess(min(count, decoder.rows - 1))
    guess = guess[: next((i for i, token in enumerate(guess) if token in stop_ids), len(guess))]
    return guess if decoder.turns_alike(1 + len(guess)) else []
