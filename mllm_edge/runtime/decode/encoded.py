"""All that a prompt is to the decoder, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mllm_edge.spec import CROSS_BIAS, CROSS_ROWS

__all__ = ["REPEATED", "Encoded"]

# Inputs with a row for each token whose last row holds for the tokens behind the prompt, too: what cross-attention sees
# of the prompt's last image, they see. The others are zero there.
REPEATED = (CROSS_BIAS, CROSS_ROWS)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt, or a part of one, as the decoder gets it.

    `embeds` [S, H] float32 with the image features in their places. `positions` [S], or [3, S] for M-RoPE; None: the
    places in the sequence. `spans` [S]: tokens with the same number > 0 see each other in both directions; None: none
    do. `per_token`: optional inputs of the graph with a row for each token, [S, …]: `deepstack.{k}` [S, H],
    `cross_attention_bias` [S, N], `cross_attention_rows` [S, 1]. `cross`: what cross-attention looks at,
    `cross.{l}.key` and `.value` [1, heads, N, D], as the component `cross_kv` returns them; empty: nothing, and its
    layers stay silent. `read` [P, H]: of an encoder-decoder, whose `embeds` are those that its decoder begins with, the
    embeddings of the prompt that its text encoder has read.
    """

    embeds: np.ndarray
    positions: np.ndarray | None = None
    spans: np.ndarray | None = None
    per_token: Mapping[str, np.ndarray] = field(default_factory=dict)
    cross: Mapping[str, np.ndarray] = field(default_factory=dict)
    read: np.ndarray | None = None

    @property
    def prompt(self) -> np.ndarray:
        """The embeddings [P, H] of the prompt's tokens, image features in their places."""
        return self.embeds if self.read is None else self.read

    def __len__(self) -> int:
        """S, the number of tokens."""
        return len(self.embeds)

    @property
    def end(self) -> int | None:
        """The position behind the highest one; None where positions are the places."""
        return None if self.positions is None else int(self.positions.max()) + 1

    @property
    def is_plain(self) -> bool:
        """Whether it is embeddings alone, at the places in the sequence."""
        return self.positions is None and self.spans is None and not self.per_token and not self.cross

    def piece(self, part: slice) -> "Encoded":
        """Some tokens of it, one behind the other."""
        return Encoded(
            self.embeds[part],
            None if self.positions is None else self.positions[..., part],
            None if self.spans is None else self.spans[part],
            {name: rows[part] for name, rows in self.per_token.items()},
            self.cross,
        )

    def followed_by(self, embeds: np.ndarray) -> "Encoded":
        """With the embeddings [n, H] of text behind it, in one sequence."""
        n, end, positions = len(embeds), self.end, self.positions
        if positions is not None and end is not None:
            behind = np.broadcast_to(end + np.arange(n), (*positions.shape[:-1], n))
            positions = np.concatenate([positions, behind], axis=-1)
        return Encoded(
            np.concatenate([self.embeds, embeds]),
            positions,
            None if self.spans is None else np.concatenate([self.spans, np.zeros(n, self.spans.dtype)]),
            {name: np.concatenate([rows, _behind(name, rows, n)]) for name, rows in self.per_token.items()},
            self.cross,
        )


def _behind(name: str, rows: np.ndarray, tokens: int) -> np.ndarray:
    """The rows of `tokens` tokens behind those with these `rows`."""
    row = rows[-1:] if name in REPEATED else np.zeros_like(rows[-1:])
    return np.repeat(row, tokens, axis=0)
