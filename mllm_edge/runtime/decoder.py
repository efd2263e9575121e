"""One decoder session with its cache: embeddings in, logits out."""

from typing import Protocol

import numpy as np

from mllm_edge.runtime.backend import Backend, Session
from mllm_edge.runtime.kv_cache import KVCache
from mllm_edge.runtime.masks import causal_bias
from mllm_edge.runtime.positions import RotaryTable, check_positions
from mllm_edge.spec import ModelSpec, Variant

__all__ = ["Decoder"]


class Decoder:
    """Steps a sequence through a decoder graph of any dialect; what the dialect wants to know is the contract's part.

    Single-token steps reuse the same bound arrays: a step writes into them and runs.
    """

    def __init__(self, session: Session, variant: Variant, model: ModelSpec, backend: Backend):
        self._session, self._variant, self._model, self._backend = session, variant, model, backend
        self._token = np.zeros((1, 1, model.hidden_size), np.float32)
        self._last = np.zeros((1, 1), np.int64)
        self._logits = np.zeros((1, 1, model.vocab_size), np.float32)
        self._bound_token = False
        self._contract: _Contract | None = None
        self.cache: KVCache | None = None

    def reset(self, capacity: int) -> KVCache:
        """Start an empty sequence of up to `capacity` tokens; a cache that is large enough is used again."""
        if self.cache is None or self.cache.capacity < capacity:
            mode = self._variant.kv_mode or "in_place"
            self.cache = KVCache(self._model.cache, self._backend, capacity, mode)
            kind = _ContribContract if self._variant.dialect == "contrib" else _StandardContract
            self._contract = kind(self._session, self._variant, self._model, capacity)
            self._session.bind({}, {"logits": self._logits})
            self._bound_token = False
        self.cache.truncate(0)
        return self.cache

    def forward(
        self, inputs_embeds: np.ndarray, positions: np.ndarray | None = None, length: int | None = None
    ) -> np.ndarray:
        """Append embeddings [S, H] float32 to the sequence; logits of the last position, [V] float32.

        `positions` [S], or [3, S] for M-RoPE: by default the places in the sequence, on all axes. `length`: where a
        prompt comes in chunks, that of the sequence with the whole prompt, for ropes that depend on it. Raises
        ContextError when the cache is full, ValueError for positions of another shape; nothing is changed then.

        The array returned is overwritten by the next call.
        """
        cache, contract = self.cache, self._contract
        assert cache is not None, "reset() comes first"
        assert contract is not None
        past, tokens = cache.length, inputs_embeds.shape[0]
        if positions is not None:
            check_positions(self._model.positions.rope, positions, tokens)
        cache.advance(tokens, self._session)
        feeds = contract.feeds(past, tokens, positions, length)
        if tokens == 1:
            self._token[0] = inputs_embeds
            if not self._bound_token:
                feeds |= {"inputs_embeds": self._token, "logits_indices": self._last}
        else:
            feeds |= {"inputs_embeds": inputs_embeds[None], "logits_indices": np.array([[tokens - 1]], np.int64)}
        self._bound_token = tokens == 1
        self._session.run(feeds)
        return self._logits[0, 0]


class _Contract(Protocol):
    """Tells the graph where the new tokens stand."""

    def feeds(self, past: int, tokens: int, positions: np.ndarray | None, length: int | None) -> dict[str, np.ndarray]:
        """The inputs that change for `tokens` new places behind `past` others; the rest as in `Decoder.forward`."""
        ...


class _ContribContract:
    """Lengths as two bound integers, and the whole rotary table.

    The operator turns a new token by the row of its place in the cache, whatever position that row was made for: the
    table serves M-RoPE as well.
    """

    def __init__(self, session: Session, variant: Variant, model: ModelSpec, capacity: int):
        self._seqlens, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        bound = {"seqlens_k": self._seqlens, "total_sequence_length": self._total}
        self._rotary = _rotary_table(model, capacity)
        if self._rotary is not None:
            bound |= {"cos": self._rotary.cos, "sin": self._rotary.sin}
        session.bind(bound, {})

    def feeds(self, past: int, tokens: int, positions: np.ndarray | None, length: int | None) -> dict[str, np.ndarray]:
        self._seqlens[0], self._total[...] = past + tokens - 1, past + tokens
        if self._rotary is not None and self._rotary.place(past, tokens, positions, length):
            return {"cos": self._rotary.cos, "sin": self._rotary.sin}
        return {}


class _StandardContract:
    """Bias and rotary rows for the new tokens; the place to write at, where the cache is in place."""

    def __init__(self, session: Session, variant: Variant, model: ModelSpec, capacity: int):
        self._window, self._writes = model.positions.window, variant.kv_mode == "in_place"
        self._rotary = _rotary_table(model, capacity)

    def feeds(self, past: int, tokens: int, positions: np.ndarray | None, length: int | None) -> dict[str, np.ndarray]:
        feeds = {"attention_bias": causal_bias(past, tokens, self._window)}
        if self._rotary is not None:
            self._rotary.place(past, tokens, positions, length)
            rows = slice(past, past + tokens)
            feeds |= {"cos": self._rotary.cos[None, rows], "sin": self._rotary.sin[None, rows]}
        if self._writes:
            feeds["write_indices"] = np.array([past], np.int64)
        return feeds


def _rotary_table(model: ModelSpec, capacity: int) -> RotaryTable | None:
    return None if model.positions.rope is None else RotaryTable(model.positions.rope, capacity)
