"""What the source model answers to the built-in questions, and what rounding its own weights costs there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mllm_edge.compare.metrics import agreement, divergence
from mllm_edge.export.checkpoint.quiet import quiet_transformers
from mllm_edge.export.reference import rounded, scores
from mllm_edge.graph.precision import HEAD_8, INT8_DYNAMIC, Precision
from mllm_edge.runtime.decode.encoded import Encoded

__all__ = ["Answered", "References", "compared"]


@dataclass(frozen=True, eq=False)
class Answered:
    """A question as token ids [S], and what the source says: its answer [n] and the logits [n, vocabulary] float32 it
    came from."""

    question: str
    images: tuple[Any, ...]
    ids: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, eq=False)
class References:
    """What the source model answers to the built-in questions; `shown`, the first that it says anything to, is for
    people. `encoded`: see `loss.encoded_once`."""

    answered: tuple[Answered, ...]
    shown: Answered
    model: Any
    encoded: dict[tuple[Any, ...], Encoded]
    _rounding: dict[int, tuple[float, float]] = field(default_factory=dict)
    _explained: dict[tuple[int, int, bool], float] = field(default_factory=dict)

    def rounding(self, bits: int) -> tuple[float, float]:
        """(mean KL in nats, agreement) of the source with its language model rounded to blocks of `bits`, its head to 8
        bits, on the questions without pictures. Takes a run of the source."""
        if bits not in self._rounding:
            self._rounding[bits] = self._rounded(Precision("blocks", bits), HEAD_8)
        return self._rounding[bits]

    def explained(self, bits: int, head_bits: int = 8, positive_scales: bool = False) -> float:
        """The mean KL in nats, on the questions without pictures, that the roundings of a target may come to: weights
        in blocks of `bits`, the head's of `head_bits`, or with one scale for each row where they are 8, and inputs of
        layers in 8 bits with one for each token. `positive_scales`: as TensorRT demands them, which loses more."""
        key = bits, head_bits, positive_scales
        if key not in self._explained:
            layers, head = (
                Precision("blocks", n) if n < INT8_DYNAMIC.bits else INT8_DYNAMIC for n in (bits, head_bits)
            )
            self._explained[key] = self._rounded(layers, head, True, positive_scales)[0]
        return self._explained[key]

    @property
    def texts(self) -> list[Answered]:
        """Those about no picture; they come first."""
        return [a for a in self.answered if not a.images]

    @cached_property
    def unrelated(self) -> float:
        """Mean KL in nats between the source's distributions at different positions: what a bundle would have whose
        logits have nothing to do with the source's."""
        logits = np.concatenate([a.logits for a in self.answered])
        return float(divergence(logits, np.roll(logits, len(logits) // 2, axis=0)).mean())

    def _rounded(self, layers: Precision, head: Precision, *how: bool) -> tuple[float, float]:
        with quiet_transformers(), rounded(self.model, layers, head, *how):
            found = scores(self.model, [a.ids for a in self.texts], [a.tokens for a in self.texts])
        return compared([a.logits for a in self.texts], found)


def compared(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean KL in nats, part of the positions with the same likeliest token)."""
    pairs = list(zip(expected, found, strict=True))
    kl = np.concatenate([divergence(a, b) for a, b in pairs])
    return float(kl.mean()), float(np.concatenate([agreement(a, b) for a, b in pairs]).mean())
