"""One answer: from the embeddings of a prompt to pieces of text and the figures of the call."""

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mllm_edge.errors import TimedOutError
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate, prefill
from mllm_edge.runtime.decode.sampling import Sampler
from mllm_edge.runtime.decode.scores import Scoring, TokenScore
from mllm_edge.runtime.decode.speculation import Guesser
from mllm_edge.runtime.limits import CAPACITY_STEP
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.prompt.tokenizer import StopStrings, StreamDecoder, Tokenizer
from mllm_edge.runtime.recall import Reused
from mllm_edge.runtime.stopping import Stopping
from mllm_edge.runtime.trace import Metrics, Trace

__all__ = ["Call", "Chunk", "FinishReason", "Pace", "Result", "answer", "begin", "unanswered"]

FinishReason = Literal["stop", "stop_string", "length", "timeout"]


@dataclass(frozen=True)
class Result:
    """A finished answer. `token_ids` are the tokens produced, without the stop token; `text` is theirs, without the
    whitespace it begins with (unless the prompt was raw).

    `logprobs`: of each of them, where they are asked for. `finish_reason`: stop (the model ended, or a guide did),
    stop_string, length (max_new_tokens or the context is used up), or timeout (the answer is as long as its time was).
    By the last two a guided text is the beginning of one that is allowed. `dropped_turns`: of a conversation, for want
    of room; see `VLM.chat`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    metrics: Metrics
    logprobs: tuple[TokenScore, ...] = ()
    dropped_turns: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer; concatenated, the texts are the answer. The last one carries the `result`. `logprobs`: of
    the tokens since the piece before, where they are asked for."""

    text: str
    token_ids: tuple[int, ...]
    result: Result | None = None
    logprobs: tuple[TokenScore, ...] = ()


class Pace:
    """A call's own clock, which stands still while the consumer has the answer; seconds.

    `waited`: for the calls of others; `consumer`: between the call and the request for its first piece, and between
    pieces.
    """

    def __init__(self) -> None:
        self.waited = self.consumer = 0.0
        self._handed_out = time.perf_counter()

    def now(self) -> float:
        """A reading of `time.perf_counter`, less what the consumer took."""
        return time.perf_counter() - self.consumer

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The first piece was asked for; the body waits for the calls of others."""
        self.take_back()
        begin = time.perf_counter()
        yield
        self.waited = time.perf_counter() - begin

    def hand_out(self) -> None:
        """The consumer gets a piece."""
        self._handed_out = time.perf_counter()

    def take_back(self) -> None:
        """It asks for the next."""
        self.consumer += time.perf_counter() - self._handed_out


@dataclass(frozen=True)
class Call:
    """What is asked: the prompt, how tokens are chosen, and what ends the answer. `lead`: whitespace before the answer
    is none of it; where the prompt is raw, the answer goes on with its text. `reuse`: see `VLM.stream`; `guided`: the
    text is a guide's; `stopping`: when it ends whatever it has done by then."""

    prompt: Prompt
    sampler: Sampler | Scoring
    stop_ids: Collection[int]
    stops: StopStrings
    max_new_tokens: int
    trace: Trace
    guesser: Guesser | None
    lead: bool = True
    reuse: bool = False
    guided: bool = False
    stopping: Stopping = field(default_factory=Stopping)
    pace: Pace = field(default_factory=Pace)


def answer(
    call: Call,
    prompt: Encoded | Reused,
    decoder: Decoder,
    embed: Embedder,
    tokenizer: Tokenizer,
    context_length: int,
) -> Generator[Chunk | None, None, None]:
    """The pieces of the answer to an encoded prompt; None stands for a token that completes none."""
    stops, trace, most = call.stops, call.trace, call.max_new_tokens
    whole = len(prompt.encoded if isinstance(prompt, Reused) else prompt)
    capacity = -(-(whole + most) // CAPACITY_STEP) * CAPACITY_STEP
    encoded, reused = begin(prompt, decoder, min(capacity, context_length) - whole, trace)
    text = StreamDecoder(tokenizer)
    ids: list[int] = []
    times: list[float] = []
    texts: list[str] = []
    begun, told = _Begun(" \n" if call.guided else None) if call.lead else str, 0
    reason: FinishReason = "stop"
    try:
        for token in generate(decoder, embed, encoded, call.sampler, call.stop_ids, most, trace, call.guesser):
            if reused is not None and not ids:
                reused.ran()
            times.append(call.pace.now())
            with trace.span("detokenize"):
                ids.append(token)
                texts.append(begun(stops.push(text.push(token))))
                scores = call.sampler.scores if isinstance(call.sampler, Scoring) else []
                chunk = Chunk(texts[-1], (token,), None, tuple(scores[told : len(ids)]))
            if stops.matched is not None:
                tail = texts[-1]
                break
            told = len(ids) if chunk.text else told
            yield chunk if chunk.text else None
        else:
            with trace.span("detokenize"):
                rest = _rest(text, call.guided and len(ids) == most)
                tail = begun(stops.push(rest) + stops.flush())
            texts.append(tail)
    except TimedOutError:
        tail, reason = begun(stops.push(_rest(text, call.guided)) + stops.flush()), "timeout"
        texts.append(tail)
    finally:
        if reused is not None:
            reused.held(ids)
    if reason != "timeout":
        reason = "length" if len(ids) == most and not call.sampler.ended else "stop"
    if stops.matched is not None:
        reason = "stop_string"
    held = (0 if decoder.cache is None else decoder.cache.nbytes) + sum(a.nbytes for a in encoded.cross.values())
    metrics = _metrics(call, times, held, 0 if reused is None else reused.count)
    scored = tuple(call.sampler.scores[: len(ids)]) if isinstance(call.sampler, Scoring) else ()
    yield Chunk(tail, (), Result("".join(texts), tuple(ids), reason, metrics, scored), scored[told:])


def unanswered(call: Call) -> Chunk:
    """The only piece of an answer whose time was over before its first token."""
    return Chunk("", (), Result("", (), "timeout", _metrics(call, (), 0, 0)))


def begin(prompt: Encoded | Reused, decoder: Decoder, room: int, trace: Trace) -> tuple[Encoded, Reused | None]:
    """Make the decoder ready for a prompt and `room` tokens behind it: what is left to run of it, all but the last part
    of which has been run."""
    with trace.span("allocate"):
        if isinstance(prompt, Encoded):
            decoder.start(prompt, room)
            return prompt, None
        prompt.resume(room)
    *first, last = prompt.pieces
    for piece in first:
        prefill(decoder, prompt.encoded.piece(piece), len(prompt.encoded), trace)
        prompt.ran(piece.stop)
    return prompt.encoded.piece(last), prompt


def _rest(text: StreamDecoder, guided: bool) -> str:
    """What is left of a text, without half a character that was cut where a guide allows whole ones."""
    rest = text.flush()
    return rest.rstrip("\ufffd") if guided else rest


class _Begun:
    """The pieces of a text without the `whitespace` (None: any) that it begins with, which parts an answer from the
    prompt: a tokenizer's first word brings a blank along, and many models begin with a new line."""

    def __init__(self, whitespace: str | None) -> None:
        self._whitespace, self._begun = whitespace, False

    def __call__(self, piece: str) -> str:
        piece = piece if self._begun else piece.lstrip(self._whitespace)
        self._begun = self._begun or bool(piece)
        return piece


def _metrics(call: Call, times: Sequence[float], kv_cache_bytes: int, reused: int) -> Metrics:
    trace, end = call.trace, call.pace.now()
    return Metrics(
        prompt_tokens=len(call.prompt.token_ids),
        image_tokens=len(call.prompt.image_positions),
        tiles=sum(layout.tiles for layout in call.prompt.layouts),
        new_tokens=len(times),
        stages=trace.stages(),
        ttft=(times[0] if times else end) - trace.origin,
        total=end - trace.origin,
        token_seconds=tuple(np.diff(times).tolist()),
        kv_cache_bytes=kv_cache_bytes,
        decode_steps=trace.runs("decode"),
        guessed=trace.counts["guessed"],
        accepted=trace.counts["accepted"],
        waited=call.pace.waited,
        consumer=call.pace.consumer,
        reused=reused,
    )
