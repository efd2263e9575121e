"""One decoder session with its cache: a prompt or tokens in, logits out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.base import Backend, Session
from mllm_edge.runtime.backends.top_logits import TopLogits
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.logits import Logits
from mllm_edge.runtime.decode.positions import check_positions, inverse_frequencies
from mllm_edge.runtime.decode.state import Cache, Snapshot
from mllm_edge.runtime.decode.step_inputs import Step, contract_for
from mllm_edge.runtime.limits import CAPACITY_STEP, MOST_ROWS
from mllm_edge.spec import ModelSpec, Variant, is_cross, rewindable

__all__ = ["Decoder", "DecoderSnapshot"]

Tokens = Encoded | np.ndarray  # an array: the embeddings [S, H] of text
Arrays = Mapping[str, np.ndarray]
# By sequence (None: all together, which see nothing): what its cross-attention sees, and the inputs that repeat.
Views = dict[int | None, tuple[Arrays | None, Arrays]]


@dataclass(frozen=True, eq=False)
class DecoderSnapshot:
    """What the cache holds, and how the sequences go on; see `Decoder.snapshot`. The rest as in `Decoder`."""

    cache: Snapshot
    shifts: np.ndarray | None
    views: Views
    viewer: int | None


class Decoder:
    """Steps sequences through a decoder graph of any dialect; what the dialect wants to know is the contract's part.

    `table`: the array that `PositionSpec.table` names. `rows`: how many rows a step that checks guesses may ask for;
    `top`: how many of the largest logits of a row the session finds itself; `deepest`: how many tokens may be behind a
    run of more than MOST_ROWS, None: any number. Single-token steps of one sequence reuse
    the same bound arrays: a step writes into them and runs.
    """

    def __init__(
        self, session: Session, variant: Variant, model: ModelSpec, backend: Backend, table: np.ndarray | None = None
    ):
        self._session, self._variant, self._model, self._backend = session, variant, model, backend
        learned = model.positions.kind == "learned"
        self._learned = table if learned else None
        self._contract = contract_for(variant, model, None if learned else table)
        self._dtype = np.dtype(next(t.dtype for t in variant.inputs if t.name == "inputs_embeds"))
        self._types = {t.name: t.dtype for t in variant.inputs}
        self.rewindable = rewindable(model.state)  # whether tokens can be forgotten again, and so be guessed
        self._token = np.zeros((1, 1, model.hidden_size), self._dtype)
        self._last = np.zeros((1, 1), np.int64)
        self._bound_token = False
        self._logits = Logits(session, backend, model.vocab_size)
        # [B], how far the positions to come are from their places, where an image takes another number of positions
        # than of places; None: nowhere.
        self._shifts: np.ndarray | None = None
        self._crosses = any(map(is_cross, self._types))
        self._views: Views = {}  # what `_viewer` sees, whose inputs are bound, may have changed since
        self._viewer: int | None = 0
        self.top = self._logits.top
        self.rows = min(MOST_ROWS, session.limits.get("rows", MOST_ROWS))
        self.deepest = session.limits.get("past")
        self.cache: Cache | None = None
        self._grows = bool(getattr(backend, "grows", False)) and "capacity" not in session.limits
        self._most = 0  # tokens that the cache may grow to
        self.starts = 0  # how often the sequences began anew

    def start(self, prompt: Encoded, room: int = 0) -> Cache:
        """Start an empty sequence that holds `prompt` and `room` tokens behind it, with what its cross-attention sees;
        the prompt is not run yet. Where the backend lets it, the cache begins with less room and grows. Raises as
        `reset`."""
        cache = self.reset(self._at_first(prompt, room))
        self._most = len(prompt) + room
        if prompt.cross:
            self.set_cross(prompt.cross)
        return cache

    def reset(self, capacity: int, batch: int = 1) -> Cache:
        """Start `batch` empty sequences of up to `capacity` tokens, whose cross-attention sees nothing yet; a cache
        that is large enough is used again.

        Raises ContextError when the session was made for shorter ones.
        """
        fixed = self._session.limits.get("capacity", capacity)
        if capacity > fixed:
            raise ContextError(
                f"{capacity} tokens are wanted, the decoder's engine holds {fixed}",
                f"mllm-edge build --max-seq {capacity}",
            )
        capacity = fixed
        if self.cache is None or self.cache.capacity < capacity or self.cache.batch != batch:
            mode = self._variant.kv_mode or "in_place"
            self.cache = Cache(self._model.state, self._backend, capacity, mode, batch, self._types)
            self._contract.reset(capacity)
            self._bound_token = False
        self.cache.truncate(0)
        self._most = capacity
        self._begin(0 if batch == 1 else None)
        self.starts += 1
        return self.cache

    def go_on(self, snapshot: DecoderSnapshot | None, count: int, prompt: Encoded, room: int = 0) -> Cache:
        """Hold the first `count` tokens of what the cache holds, or of a snapshot, and have room for `prompt`, which
        begins with these, and `room` tokens behind it; with what its cross-attention sees. The rest of the prompt is
        not run yet. Raises as `reset`."""
        held, least = self.cache, len(prompt) + room
        if self._grows:  # when tokens come; what is held is copied but once
            least = 0 if snapshot is None else snapshot.cache.length
        if held is None or held.batch != 1 or held.capacity < least:
            snapshot = self.snapshot() if snapshot is None else snapshot
            held = self.reset(self._at_first(prompt, room))
        if snapshot is not None:
            held.restore(snapshot.cache)
        held.truncate(count)
        self._most = len(prompt) + room
        self._begin(0)
        if prompt.cross:
            self.set_cross(prompt.cross)
        return held

    def _at_first(self, prompt: Encoded, room: int) -> int:
        """The capacity that a sequence begins with: long answers are rare where many tokens are allowed."""
        return len(prompt) + room if not self._grows else min(len(prompt) + room, _stepped(len(prompt) + CAPACITY_STEP))

    def _make_room(self, tokens: int) -> None:
        """Let the cache of one sequence grow for so many tokens more, by a half at least, as far as it may."""
        cache = self._opened()
        wanted = cache.length + tokens
        if self._grows and cache.batch == 1 and cache.capacity < wanted <= self._most:
            try:
                cache.grow(min(self._most, _stepped(max(wanted, cache.capacity * 3 // 2))), self._session)
            except BaseException:  # some buffers may have grown, and some not
                self.forget()
                raise
            self._contract.reset(cache.capacity)
            self._bound_token = False

    @property
    def held_bytes(self) -> int:
        """About what a snapshot takes."""
        cache = self._opened()
        return cache.nbytes * cache.length // max(1, cache.capacity)

    def _begin(self, viewer: int | None) -> None:
        self._shifts = None
        self._contract.begin()
        self._views = {}
        self._bind_view(viewer)

    def forget(self) -> None:
        """Drop the cache and all that is bound for steps: after a call that ended somewhere within one."""
        self._logits.forget()
        self._bound_token, self.cache, self._shifts = False, None, None

    def snapshot(self) -> DecoderSnapshot:
        """Copy what the cache holds, and how the tokens to come go on: their positions, what their cross-attention
        sees, and the inputs that repeat."""
        shifts = None if self._shifts is None else self._shifts.copy()
        self._keep_view()
        return DecoderSnapshot(self._opened().snapshot(), shifts, dict(self._views), self._viewer)

    def restore(self, snapshot: DecoderSnapshot) -> None:
        """Go back to a snapshot; raises as `Cache.restore`."""
        self._opened().restore(snapshot.cache)
        self._shifts = None if snapshot.shifts is None else snapshot.shifts.copy()
        self._views = dict(snapshot.views)
        self._bind_view(snapshot.viewer)

    def set_cross(self, cross_kv: Arrays | None, sequence: int = 0) -> None:
        """What cross-attention layers look at in a sequence, as in `Encoded.cross`. None: nothing, and the layers stay
        silent."""
        self._keep_view()
        self._views[sequence] = (cross_kv, {})
        self._bind_view(sequence)

    def forward(self, tokens: Tokens, length: int | None = None, *, project: Sequence[int] | None = None) -> np.ndarray:
        """Append tokens to the only sequence; logits of the last one, [V] float32.

        Positions are by default those that go on behind the highest of the last given ones, or else the places in the
        sequence, on all axes. `length`: where a prompt comes in chunks, the highest position of the whole prompt + 1,
        for ropes that depend on it. `project`: the tokens among these S to project instead, logits [K, V].

        Raises ContextError when the cache is full, ValueError for positions of another shape or an input that the graph
        does not have; nothing is changed then. The array returned is overwritten by the next call.
        """
        cache = self._opened()
        if cache.batch != 1:
            raise ValueError(f"forward takes one sequence, the cache holds {cache.batch}: use forward_batch")
        logits = self._step([_encoded(tokens)], length, project)
        return logits[0, 0] if project is None else logits[0]

    def top_logits(
        self, tokens: Tokens, length: int | None = None, *, project: Sequence[int] | None = None
    ) -> list[TopLogits]:
        """As `forward`, but of each row of logits only the `top` largest leave the device; for sessions that find
        them. What is returned is overwritten by the next call."""
        self._step([_encoded(tokens)], length, project, top=True)
        return [self._logits.top_of(row) for row in range(1 if project is None else len(project))]

    def turns_alike(self, tokens: int) -> bool:
        """Whether the next `tokens` tokens of the only sequence get the same rotary tables in one step as one by one;
        those of ropes that depend on the sequence's length may not."""
        first = self._opened().length + 1 + (0 if self._shifts is None else int(self._shifts[0]))
        return all(
            np.array_equal(inverse_frequencies(rope, first), inverse_frequencies(rope, first + tokens - 1))
            for rope in self._model.positions.ropes
            if rope.depends_on_length
        )

    def takes_batch(self, counts: Sequence[int]) -> bool:
        """Whether the next `counts` [B] tokens of all sequences, at the places that follow, can be one run."""
        cache = self._opened()
        plain = cache.mode == "in_place" and self._shifts is None and all(v is None for v, _ in self._views.values())
        # The padding behind a shorter sequence's tokens would go into its recurrent state.
        plain = plain and (self.rewindable or len(set(counts)) == 1)
        return plain and self._contract.takes_batch(cache, np.array(counts))

    def forward_batch(self, tokens: Sequence[Tokens]) -> np.ndarray:
        """Append tokens to each sequence, of unequal number if need be; logits of each one's last, [B, V] float32.

        Runs as one batch where the graph can, else sequence by sequence. Raises as `forward`.
        """
        cache, pieces = self._opened(), [_encoded(some) for some in tokens]
        if len(pieces) != cache.batch:
            raise ValueError(f"{len(pieces)} sequences for a cache of {cache.batch}: reset() with that batch")
        if all(piece.is_plain for piece in pieces) and self.takes_batch([len(piece) for piece in pieces]):
            return self._step(pieces, None, None)[:, 0]
        return np.stack([self._step([piece], None, None, sequence=b)[0, 0].copy() for b, piece in enumerate(pieces)])

    def _step(
        self,
        pieces: Sequence[Encoded],
        length: int | None,
        project: Sequence[int] | None,
        sequence: int | None = None,
        top: bool = False,
    ) -> np.ndarray:
        """One run, of one `sequence` alone or of all; logits [B, K, V], unless they are kept for the `top` of them."""
        cache, first = self._opened(), pieces[0]
        self._view(sequence, first)
        pasts = cache.lengths.copy() if sequence is None else cache.lengths[sequence : sequence + 1].copy()
        counts = [len(piece) for piece in pieces]
        if first.positions is not None:
            check_positions(self._model.positions.ropes, first.positions, counts[0])
        self._contract.check(first.per_token)
        self._make_room(max(counts))
        shifts, last = self._shifts, self._contract.last
        cache.advance(counts, self._session, sequence)
        try:
            positions = self._follow(first.positions, sequence or 0, counts[0])
            step = Step(pasts, max(counts), np.array(counts), positions, length, first.spans)
            feeds = self._contract.feeds(step, first.per_token)
            feeds |= self._tokens(pieces, step, project)
            self._logits.place(len(pieces), 1 if project is None else len(project), top)
            self._session.run(feeds)
        except BaseException:
            cache.lengths[slice(None) if sequence is None else slice(sequence, sequence + 1)] = pasts
            self._shifts, self._bound_token = shifts, False
            self._contract.begin(last)
            raise
        if not self.rewindable:
            cache.turn(sequence)
        return self._logits.array

    def _view(self, sequence: int | None, piece: Encoded) -> None:
        """Bind what a sequence's cross-attention sees, or all together see, for a run with this piece."""
        if not self._crosses:
            return
        viewer = 0 if self._opened().batch == 1 else sequence
        if viewer != self._viewer:
            self._keep_view()
            self._bind_view(viewer)
        if (
            viewer is not None
            and self._opened().batch > 1
            and piece.cross
            and piece.cross is not self._views[viewer][0]
        ):
            self.set_cross(piece.cross, viewer)

    def _keep_view(self) -> None:
        """Note what the tokens to come of the sequence that is bound repeat."""
        self._views[self._viewer] = (self._views.get(self._viewer, (None, {}))[0], self._contract.last)

    def _bind_view(self, sequence: int | None) -> None:
        cross_kv, last = self._views.setdefault(sequence, (None, {}))
        if self._crosses:
            batch = self._opened().batch if sequence is None else 1
            self._session.bind(self._contract.cross(cross_kv, batch), {})
        self._contract.begin(last)
        self._viewer = sequence

    def _follow(self, positions: np.ndarray | None, sequence: int, tokens: int) -> np.ndarray | None:
        """The positions of the last `tokens` of a sequence, given or not; those to come go on behind them."""
        if positions is None and self._shifts is None:
            return None
        cache = self._opened()
        end = int(cache.lengths[sequence])
        if positions is None:
            assert self._shifts is not None
            return np.arange(end - tokens, end) + self._shifts[sequence]
        # A new array: a run that fails leaves the old one.
        self._shifts = np.zeros(cache.batch, np.int64) if self._shifts is None else self._shifts.copy()
        self._shifts[sequence] = int(positions.max()) + 1 - end
        return positions

    def _tokens(self, pieces: Sequence[Encoded], step: Step, project: Sequence[int] | None) -> dict[str, np.ndarray]:
        """Embeddings, and the tokens to project."""
        batch, tokens = len(pieces), step.tokens
        if batch == tokens == 1 and project is None:
            self._token[0] = self._placed(pieces[0].embeds, int(step.pasts[0]))
            bound, self._bound_token = self._bound_token, True
            return {} if bound else {"inputs_embeds": self._token, "logits_indices": self._last}
        self._bound_token = False
        padded = np.zeros((batch, tokens, self._model.hidden_size), self._dtype)
        for target, piece, past in zip(padded, pieces, step.pasts, strict=True):
            target[: len(piece)] = self._placed(piece.embeds, int(past))
        indices = step.counts[:, None] - 1 if project is None else np.array([project])
        return {"inputs_embeds": padded, "logits_indices": indices.astype(np.int64)}

    def _placed(self, embeds: np.ndarray, past: int) -> np.ndarray:
        """Embeddings [S, H] with their learned positions, where the model has such."""
        return embeds if self._learned is None else embeds + self._learned[past : past + len(embeds)]

    def _opened(self) -> Cache:
        assert self.cache is not None, "reset() comes first"
        return self.cache


def _stepped(capacity: int) -> int:
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP


def _encoded(tokens: Tokens) -> Encoded:
    return tokens if isinstance(tokens, Encoded) else Encoded(tokens)
