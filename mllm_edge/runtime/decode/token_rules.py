"""Which tokens may not come next, by the checkpoint's own generation settings; each as transformers applies it
(generation/logits_process.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mllm_edge.spec import GenerationDefaults

__all__ = ["TokenRules"]


class TokenRules:
    """Forbids tokens of one answer. `observe` is told each token that was chosen."""

    def __init__(self, defaults: GenerationDefaults, prompt_ids: Sequence[int] | np.ndarray, stop_ids: Collection[int]):
        self._defaults = defaults
        self._ids = [int(i) for i in prompt_ids]
        self._prompt = len(self._ids)
        self._stop_ids = tuple(stop_ids)
        self._always = frozenset(defaults.suppress_tokens)
        # A word that is a stop id alone is let through, as in transformers.
        self._words = [w for w in defaults.bad_words_ids if w and not (len(w) == 1 and w[0] in self._stop_ids)]
        self._followers: dict[tuple[int, ...], set[int]] = {}
        if defaults.no_repeat_ngram_size:
            for end in range(1, self._prompt + 1):
                self._note_ngram(end)

    @staticmethod
    def wanted(defaults: GenerationDefaults) -> bool:
        """Whether the settings forbid anything at all."""
        return bool(
            defaults.no_repeat_ngram_size
            or defaults.suppress_tokens
            or defaults.begin_suppress_tokens
            or defaults.bad_words_ids
            or defaults.min_new_tokens
            or defaults.min_length
        )

    def observe(self, token: int) -> None:
        """Count `token` as part of the answer."""
        self._ids.append(token)
        self._note_ngram(len(self._ids))

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """A copy of `logits` [V] in which forbidden tokens are −inf."""
        forbidden = np.fromiter((i for i in self.forbidden() if 0 <= i < len(logits)), np.int64)
        allowed = logits.astype(np.float32)
        allowed[forbidden] = -np.inf
        return allowed

    def forbidden(self) -> set[int]:
        """Ids that may not come next."""
        found = set(self._always)
        new = len(self._ids) - self._prompt
        if new == 0:
            found |= set(self._defaults.begin_suppress_tokens)
        if new < self._defaults.min_new_tokens or len(self._ids) < self._defaults.min_length:
            found |= set(self._stop_ids)
        for word in self._words:
            before = len(word) - 1
            if before == 0 or (before <= len(self._ids) and tuple(self._ids[-before:]) == word[:-1]):
                found.add(word[-1])
        size = self._defaults.no_repeat_ngram_size
        if size and len(self._ids) + 1 >= size:
            found |= self._followers.get(tuple(self._ids[len(self._ids) - size + 1 :]), set())
        return found

    def _note_ngram(self, end: int) -> None:
        size = self._defaults.no_repeat_ngram_size
        if size and end >= size:
            ngram = self._ids[end - size : end]
            self._followers.setdefault(tuple(ngram[:-1]), set()).add(ngram[-1])
