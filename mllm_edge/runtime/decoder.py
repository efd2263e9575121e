"""One decoder session with its cache: embeddings in, logits out."""

import numpy as np

from mllm_edge.runtime.backend import Backend, Session
from mllm_edge.runtime.kv_cache import KVCache
from mllm_edge.runtime.positions import rope_tables
from mllm_edge.spec import ModelSpec

__all__ = ["Decoder"]


class Decoder:
    """Steps a batch of one through the `contrib` contract (see export/decoder/build.py).

    Single-token steps reuse the same bound arrays: a step writes into them and runs.
    """

    def __init__(self, session: Session, model: ModelSpec, backend: Backend):
        self._session, self._model, self._backend = session, model, backend
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._token = np.zeros((1, 1, model.hidden_size), np.float32)
        self._last = np.zeros((1, 1), np.int64)
        self._logits = np.zeros((1, 1, model.vocab_size), np.float32)
        self._bound_step = False
        self.cache: KVCache | None = None

    def reset(self, capacity: int) -> KVCache:
        """Start an empty sequence of up to `capacity` tokens; a cache that is large enough is used again."""
        if self.cache is None or self.cache.capacity < capacity:
            self.cache = KVCache(self._model.cache, self._backend, capacity)
            inputs, outputs = self.cache.bindings()
            self._session.bind({**inputs, **self._tables(capacity)}, outputs)
            self._session.bind({"seqlens_k": self._seqlens, "total_sequence_length": self._total}, {})
            self._session.bind({}, {"logits": self._logits})
            self._bound_step = False
        self.cache.truncate(0)
        return self.cache

    def forward(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append embeddings [S, H] float32 to the sequence; logits of the last position, [V] float32.

        The array returned is overwritten by the next call.
        """
        cache = self.cache
        assert cache is not None, "reset() comes first"
        length = inputs_embeds.shape[0]
        cache.advance(length)
        self._seqlens[0], self._total[...] = cache.length - 1, cache.length
        if length == 1:
            self._token[0] = inputs_embeds
            feeds: dict[str, np.ndarray] = (
                {} if self._bound_step else {"inputs_embeds": self._token, "logits_indices": self._last}
            )
        else:
            feeds = {"inputs_embeds": inputs_embeds[None], "logits_indices": np.array([[length - 1]], np.int64)}
        self._bound_step = length == 1
        self._session.run(feeds)
        return self._logits[0, 0]

    def _tables(self, capacity: int) -> dict[str, np.ndarray]:
        rope = self._model.positions.rope
        if rope is None:
            return {}
        cos, sin = rope_tables(rope, np.arange(capacity))
        return {"cos": cos, "sin": sin}
