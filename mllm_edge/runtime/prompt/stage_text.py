"""The prompt's text as an input of the stages before the decoder, in tokens of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_edge.errors import PromptError
from mllm_edge.runtime.prompt.control_tokens import Piece, encode_pieces
from mllm_edge.runtime.prompt.tokenizer import Tokenizer
from mllm_edge.spec import GenerationSpec, ImageSpec, StageText

__all__ = ["StageTokens"]


class StageTokens:
    """Makes the input of `spec` with its tokenizer."""

    def __init__(self, spec: StageText, tokenizer: Tokenizer):
        self.spec, self._tokenizer = spec, tokenizer
        added = sorted(tokenizer.added_tokens.values(), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, added)) or '(?!)'})")
        self._left_out = re.compile("|".join(map(re.escape, spec.without)) or "(?!)")

    @classmethod
    def load(cls, bundle_dir: Path, image: ImageSpec | None) -> StageTokens | None:
        """Of a bundle whose images come with the prompt's text, else None; raises BundleError."""
        if image is None or image.text is None:
            return None
        return cls(image.text, Tokenizer.load(bundle_dir, GenerationSpec(()), image.text.file))

    def ids(self, pieces: Sequence[Piece]) -> np.ndarray:
        """[1, T] int64 of a rendered text without images' placeholders; what spells a token stays text. Raises
        PromptError for more tokens than the stages take."""
        text = "".join(piece.text if piece.spelled else self._left_out.sub("", piece.text) for piece in pieces)
        parts = [Piece(part, i % 2 == 1) for i, part in enumerate(self._added.split(text)) if part]
        ids = encode_pieces(self._tokenizer, parts or [Piece("")], True)
        if len(ids) > self.spec.most:
            raise PromptError(
                f"the text has {len(ids)} tokens for what looks at images, which reads {self.spec.most} at most",
                "shorten the text",
            )
        return np.array([ids], np.int64)
