"""What a decoder remembers of the tokens that it has seen."""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CacheSpec",
]


@dataclass(frozen=True)
class CacheSpec:
    """One kind of decoder state. `kv`: `past_key_values.N.key` and `.value` for N in range(layers), each
    [batch, heads, capacity, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    kind: Literal["kv"] = "kv"
