"""One decoder session with its cache: embeddings in, logits out."""

from collections.abc import Mapping, Sequence

import numpy as np

from mllm_edge.errors import ContextError
from mllm_edge.runtime.backends.base import Backend, Buffer, Session
from mllm_edge.runtime.backends.top_logits import IDS, SUM, VALUES, Best
from mllm_edge.runtime.decode.positions import check_positions, inverse_frequencies
from mllm_edge.runtime.decode.state import KVCache
from mllm_edge.runtime.decode.step_inputs import Step, contract_for
from mllm_edge.runtime.limits import MOST_ROWS
from mllm_edge.spec import ModelSpec, Variant

__all__ = ["Decoder"]


class Decoder:
    """Steps sequences through a decoder graph of any dialect; what the dialect wants to know is the contract's part.

    `table`: the array that `PositionSpec.table` names. `best` and `rows`: how many of the largest logits of a row the
    session finds itself, and how many rows a step that checks guesses may ask for. Single-token steps of one sequence
    reuse the same bound arrays: a step writes into them and runs.
    """

    def __init__(
        self, session: Session, variant: Variant, model: ModelSpec, backend: Backend, table: np.ndarray | None = None
    ):
        self._session, self._variant, self._model, self._backend = session, variant, model, backend
        learned = model.positions.kind == "learned"
        self._learned = table if learned else None
        self._contract = contract_for(variant, model, None if learned else table)
        self._dtype = np.dtype(next(t.dtype for t in variant.inputs if t.name == "inputs_embeds"))
        caches = [t.dtype for t in variant.inputs if t.name.startswith("past_key_values.")]
        self._cache_dtype = caches[0] if caches else self._dtype.name
        self._token = np.zeros((1, 1, model.hidden_size), self._dtype)
        self._last = np.zeros((1, 1), np.int64)
        self._bound_token = False
        self._logits = self._rows = np.zeros((0, 0, 0), np.float32)
        self._largest: dict[str, np.ndarray] = {}
        self._kept: Buffer | None = None
        self._kept_rows: Buffer | None = None
        self.best = session.limits.get("best", 0)
        self.rows = min(MOST_ROWS, session.limits.get("rows", MOST_ROWS))
        self.cache: KVCache | None = None

    def reset(self, capacity: int, batch: int = 1) -> KVCache:
        """Start `batch` empty sequences of up to `capacity` tokens; a cache that is large enough is used again.

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
            self.cache = KVCache(self._model.cache, self._backend, capacity, mode, batch, self._cache_dtype)
            self._contract.reset(capacity)
            self._bound_token = False
        self.cache.truncate(0)
        return self.cache

    def forget(self) -> None:
        """Drop the cache and all that is bound for steps: after a call that ended somewhere within one."""
        if self._largest:
            self._session.bind({}, dict.fromkeys(self._largest))
        self._bound_token, self._largest = False, {}
        self._logits = self._rows = np.zeros((0, 0, 0), np.float32)
        self._kept = self._kept_rows = self.cache = None

    def set_cross(self, cross_kv: Mapping[str, np.ndarray] | None) -> None:
        """What cross-attention layers look at: `cross.{l}.key` and `.value` [1, heads, N, D], as the component
        `cross_kv` returns them. None: nothing, and the layers stay silent."""
        self._session.bind(self._contract.cross(cross_kv), {})

    def forward(
        self,
        inputs_embeds: np.ndarray,
        positions: np.ndarray | None = None,
        length: int | None = None,
        *,
        rows: Sequence[int] | None = None,
        blocks: np.ndarray | None = None,
        extras: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Append embeddings [S, H] to the only sequence; logits of the last position, [V] float32.

        `positions` [S], or [3, S] for M-RoPE: by default those that go on behind the highest of the last given ones,
        or else the places in the sequence, on all axes. `length`: where a prompt comes in chunks, the highest position
        of the whole prompt + 1, for ropes that depend on it. `rows`: the positions within these S to project instead,
        logits [K, V]. `blocks` [S]: tokens with the same number > 0 see each other in both directions. `extras`:
        optional inputs of the graph, without the batch axis: `deepstack.{k}` [S, H], `cross_attention_bias` [1, S, N],
        `cross_attention_rows` [S, 1].

        Raises ContextError when the cache is full, ValueError for positions of another shape; nothing is changed then.
        The array returned is overwritten by the next call.
        """
        cache = self._opened()
        if cache.batch != 1:
            raise ValueError(f"forward takes one sequence, the cache holds {cache.batch}: use forward_batch")
        logits = self._step([inputs_embeds], positions, length, rows, blocks, extras)
        return logits[0, 0] if rows is None else logits[0]

    def forward_best(
        self,
        inputs_embeds: np.ndarray,
        positions: np.ndarray | None = None,
        length: int | None = None,
        *,
        blocks: np.ndarray | None = None,
    ) -> Best:
        """As `forward`, but of the last position's logits only the `best` largest leave the device; for sessions that
        find them. What is returned is overwritten by the next call."""
        self._step([inputs_embeds], positions, length, None, blocks, None, best=True)
        return self._best_of(0)

    def best_rows(self, inputs_embeds: np.ndarray, rows: Sequence[int]) -> list[Best]:
        """As `forward_best`, of the positions `rows` [K] within these S."""
        self._step([inputs_embeds], None, None, rows, None, None, best=True)
        return [self._best_of(row) for row in range(len(rows))]

    def turns_alike(self, tokens: int) -> bool:
        """Whether the next `tokens` tokens of the only sequence get the same rotary tables in one step as one by one;
        those of ropes that depend on the sequence's length may not."""
        cache = self._opened()
        first = cache.length + 1 + (0 if cache.shifts is None else int(cache.shifts[0]))
        return all(
            np.array_equal(inverse_frequencies(rope, first), inverse_frequencies(rope, first + tokens - 1))
            for rope in self._model.positions.ropes
            if rope.depends_on_length
        )

    def takes_batch(self, counts: Sequence[int]) -> bool:
        """Whether the next `counts` [B] tokens of all sequences, at the places that follow, can be one run."""
        cache = self._opened()
        return cache.mode == "in_place" and cache.shifts is None and self._contract.takes_batch(cache, np.array(counts))

    def forward_batch(
        self, inputs_embeds: Sequence[np.ndarray], positions: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Append embeddings [S_b, H] to each sequence b, of unequal lengths if need be; logits of each one's last
        position, [B, V] float32. `positions` as in `forward`, one for each.

        Runs as one batch where the graph can, else sequence by sequence. Raises as `forward`.
        """
        cache = self._opened()
        if len(inputs_embeds) != cache.batch:
            raise ValueError(f"{len(inputs_embeds)} sequences for a cache of {cache.batch}: reset() with that batch")
        if positions is None and self.takes_batch([len(embeds) for embeds in inputs_embeds]):
            return self._step(inputs_embeds, None, None, None, None, None)[:, 0]
        given = positions if positions is not None else (None,) * cache.batch
        results = [
            self._step([embeds], where, None, None, None, None, row=b)[0, 0].copy()
            for b, (embeds, where) in enumerate(zip(inputs_embeds, given, strict=True))
        ]
        return np.stack(results)

    def _step(
        self,
        embeds: Sequence[np.ndarray],
        positions: np.ndarray | None,
        length: int | None,
        rows: Sequence[int] | None,
        blocks: np.ndarray | None,
        extras: Mapping[str, np.ndarray] | None,
        row: int | None = None,
        best: bool = False,
    ) -> np.ndarray:
        """One run, of sequence `row` alone or of all; logits [B, K, V], unless they are kept for the `best` of them."""
        cache = self._opened()
        pasts = cache.lengths.copy() if row is None else cache.lengths[row : row + 1].copy()
        counts = [len(e) for e in embeds]
        if positions is not None:
            check_positions(self._model.positions.ropes, positions, counts[0])
        cache.advance(counts, self._session, row)
        if positions is not None or cache.shifts is not None:
            positions = _follow(cache, positions, row or 0, counts[0])
        step = Step(pasts, max(counts), np.array(counts), positions, length, blocks)
        feeds = self._contract.feeds(step, extras or {})
        feeds |= self._tokens(embeds, step, rows)
        self._place_logits((len(embeds), 1 if rows is None else len(rows), self._model.vocab_size), best)
        self._session.run(feeds)
        return self._logits

    def _tokens(self, embeds: Sequence[np.ndarray], step: Step, rows: Sequence[int] | None) -> dict[str, np.ndarray]:
        """Embeddings, and the rows to project."""
        batch, tokens = len(embeds), step.tokens
        if batch == tokens == 1 and rows is None:
            self._token[0] = self._placed(embeds[0], int(step.pasts[0]))
            bound, self._bound_token = self._bound_token, True
            return {} if bound else {"inputs_embeds": self._token, "logits_indices": self._last}
        self._bound_token = False
        padded = np.zeros((batch, tokens, self._model.hidden_size), self._dtype)
        for target, source, past in zip(padded, embeds, step.pasts, strict=True):
            target[: len(source)] = self._placed(source, int(past))
        indices = step.counts[:, None] - 1 if rows is None else np.array([rows])
        return {"inputs_embeds": padded, "logits_indices": indices.astype(np.int64)}

    def _place_logits(self, shape: tuple[int, int, int], best: bool) -> None:
        """Where the run leaves its logits: in an array, or on the device, and the largest of them in arrays."""
        found = self._largest[SUM].shape[1] if best and self._largest else 0
        if best and found != shape[1]:
            assert shape[0] == 1, "positions of one sequence"
            self._kept, self._logits = self._device_rows(shape), np.zeros((0, 0, 0), np.float32)
            sizes = {VALUES: self.best, IDS: self.best, SUM: 1}
            types = {VALUES: np.float32, IDS: np.int32, SUM: np.float32}
            self._largest = {name: np.zeros((1, shape[1], size), types[name]) for name, size in sizes.items()}
            self._session.bind({}, {"logits": self._kept, **self._largest})
        elif not best and self._logits.shape != shape:
            unbound = dict.fromkeys(self._largest)
            self._logits, self._largest = self._host_rows(shape), {}
            self._kept = self._kept_rows = None
            self._session.bind({}, {"logits": self._logits, **unbound})

    def _host_rows(self, shape: tuple[int, int, int]) -> np.ndarray:
        """An array for logits. Steps that check guesses change their width all the time: they share one."""
        batch, rows, size = shape
        if batch == 1 < rows <= MOST_ROWS and not self._rows.size:
            self._rows = np.zeros((1, MOST_ROWS, size), np.float32)
        return self._rows[:, :rows] if batch == 1 and rows <= self._rows.shape[1] else np.zeros(shape, np.float32)

    def _device_rows(self, shape: tuple[int, int, int]) -> Buffer:
        """Likewise on the device."""
        _, rows, size = shape
        if self._kept_rows is None or self._kept_rows.nbytes < 4 * rows * size:
            most = 1 if rows == 1 else max(rows, MOST_ROWS)
            self._kept_rows = self._backend.allocate((1, most, size), "float32")
        return self._kept_rows.part(1, 0, rows)

    def _best_of(self, row: int) -> Best:
        kept, largest = self._kept, self._largest
        assert kept is not None
        total = float(largest[SUM][0, row, 0])
        whole = kept.part(1, row, row + 1)
        return Best(largest[VALUES][0, row], largest[IDS][0, row], total, lambda: whole.read(0, 1)[0, 0])

    def _placed(self, embeds: np.ndarray, past: int) -> np.ndarray:
        """Embeddings [S, H] with their learned positions, where the model has such."""
        return embeds if self._learned is None else embeds + self._learned[past : past + len(embeds)]

    def _opened(self) -> KVCache:
        assert self.cache is not None, "reset() comes first"
        return self.cache


def _follow(cache: KVCache, positions: np.ndarray | None, row: int, tokens: int) -> np.ndarray:
    """The positions of the last `tokens` of sequence `row`, given or not; those to come go on behind them."""
    if cache.shifts is None:
        cache.shifts = np.zeros(cache.batch, np.int64)
    end = int(cache.lengths[row])
    if positions is None:
        return np.arange(end - tokens, end) + cache.shifts[row]
    cache.shifts[row] = int(positions.max()) + 1 - end
    return positions
