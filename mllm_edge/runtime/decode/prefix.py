"""What a decoder holds of earlier prompts: the beginning of a new one need not be run again."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.decode.decoder import Decoder, DecoderSnapshot
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.positions import inverse_frequencies
from mllm_edge.spec import ModelSpec

__all__ = ["Prefixes", "shared"]


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """How many numbers two sequences [n], [m] begin with alike."""
    least = min(len(first), len(second))
    differ = np.flatnonzero(first[:least] != second[:least])
    return int(differ[0]) if len(differ) else least


@dataclass(frozen=True, eq=False)
class _Kept:
    keys: np.ndarray
    snapshot: DecoderSnapshot

    @property
    def nbytes(self) -> int:
        cache = self.snapshot.cache
        return self.keys.nbytes + sum(array.nbytes for array in (*cache.rows, *cache.recurrent))


class Prefixes:
    """The tokens that a decoder's cache holds, by their keys (see `Prompt.keys`), and snapshots of others, the most
    recently used ones of up to `budget` bytes.

    Where state can be rewound, any common beginning is used; where it can't, only a beginning that ends where the cache
    or a snapshot does. A sequence of which less than half is shared is kept as a snapshot before it is given up.
    """

    def __init__(self, decoder: Decoder, model: ModelSpec, budget: int):
        self._decoder, self._model, self._budget = decoder, model, budget
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._keys, self._start = np.zeros(0, np.int64), -1

    @property
    def held(self) -> np.ndarray:
        """The keys of what the cache holds now; none where others have used the decoder since."""
        cache = self._decoder.cache
        if cache is None or self._start != self._decoder.starts or cache.length != len(self._keys):
            return np.zeros(0, np.int64)
        return self._keys

    @property
    def rewindable(self) -> bool:
        """Whether the decoder's state can be rewound."""
        return self._decoder.rewindable

    @property
    def nbytes(self) -> int:
        """Of the snapshots."""
        return sum(kept.nbytes for kept in self._kept.values())

    def usable(self, keys: np.ndarray, spans: np.ndarray | None, end: int) -> int:
        """How many of the first tokens of a prompt need not be run; one is always left. `spans` as of `Encoded`, `end`:
        the position behind its last."""
        image = self._model.image
        both_ways = image is not None and image.both_ways == "prompt"
        if self._model.text_encoder is not None or both_ways or self._turned(end):
            return 0
        found = [self._of(self.held, keys), *(self._of(kept.keys, keys) for kept in self._kept.values())]
        return max(self._whole(count, keys, spans) for count in found)

    def resume(self, keys: np.ndarray, count: int, prompt: Encoded, room: int) -> None:
        """Make the decoder hold the first `count` tokens of a prompt, as many as `usable` said, and nothing else, with
        room for all of it and `room` more behind. Raises as `Decoder.reset`."""
        held = self.held
        if len(held) and shared(held, keys) * 2 < len(held):
            self.keep()
        if count == 0:
            self._decoder.start(prompt, room)
        else:
            if self._of(held, keys) < count:
                best = max(self._kept.values(), key=lambda kept: self._of(kept.keys, keys))
                self._kept.move_to_end(best.keys.tobytes())
                self._decoder.go_on(best.snapshot, count, prompt, room)
            else:
                self._decoder.go_on(None, count, prompt, room)
        self.hold(keys[:count])

    def hold(self, keys: np.ndarray) -> None:
        """Note that the cache holds the first of these tokens, as many as it has places filled."""
        cache = self._decoder.cache
        self._keys, self._start = keys[: 0 if cache is None else cache.length], self._decoder.starts

    def keep(self) -> None:
        """Keep a snapshot of what the cache holds, if that is within the budget."""
        held, decoder = self.held, self._decoder
        if not len(held) or decoder.held_bytes > self._budget:
            return
        # What begins a longer one is worth nothing beside it, where that can be rewound.
        if decoder.rewindable:
            for name in [n for n, kept in self._kept.items() if shared(kept.keys, held) == len(kept.keys)]:
                del self._kept[name]
        self.add(held, decoder.snapshot())

    def best(self, keys: np.ndarray) -> tuple[np.ndarray, DecoderSnapshot] | None:
        """The sequence that begins most like this one, or is its beginning, and a snapshot of it; None where none
        does."""
        found = [(shared(self.held, keys), None), *((shared(k.keys, keys), k) for k in self._kept.values())]
        count, kept = max(found, key=lambda pair: pair[0])
        if count == 0:
            return None
        return (self.held, self._decoder.snapshot()) if kept is None else (kept.keys, kept.snapshot)

    def add(self, keys: np.ndarray, snapshot: DecoderSnapshot) -> None:
        """Keep a snapshot; the ones that were not used for the longest time go where the budget ends."""
        self._kept[keys.tobytes()] = _Kept(keys, snapshot)
        self._kept.move_to_end(keys.tobytes())
        while self.nbytes > self._budget and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def _of(self, held: np.ndarray, keys: np.ndarray) -> int:
        """How many tokens of a sequence that was held begin a prompt."""
        count = shared(held, keys)
        if self._decoder.rewindable:
            return min(count, len(keys) - 1)
        return count if count == len(held) < len(keys) else 0

    def _whole(self, count: int, keys: np.ndarray, spans: np.ndarray | None) -> int:
        """Without a part of what sees each other in both directions."""
        if spans is None or not 0 < count < len(keys) or not spans[count] or spans[count] != spans[count - 1]:
            return count
        begin = int(np.flatnonzero(spans == spans[count])[0])
        return begin if self._decoder.rewindable else 0

    def _turned(self, end: int) -> bool:
        """Whether a rope turns keys of a sequence of that length otherwise than those of short ones."""
        return any(
            not np.array_equal(inverse_frequencies(rope, 1), inverse_frequencies(rope, length))
            for rope in self._model.positions.ropes
            if rope.depends_on_length
            for length in (end, len(self.held))
        )
