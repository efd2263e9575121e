"""What a decoder is made of: the frozen description that the graph is built from."""

from collections.abc import Mapping
from dataclasses import dataclass

from mllm_edge.spec import RopeSpec

__all__ = ["AttentionSpec", "DecoderSpec", "WeightNames"]


@dataclass(frozen=True)
class WeightNames:
    """Where each tensor stands in the checkpoint. In `layer` values `{i}` is the layer number, without `.weight`."""

    layer: Mapping[str, str]
    final_norm: str
    lm_head: str


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention of one layer. `scale` multiplies q·k; `qk_norm` normalizes each head of q and k (RMS, before
    rope); `window` is the number of latest positions a token sees, itself included (None: all before it)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm transformer decoder with RMS norms, grouped-query attention, rope and a gated SiLU MLP.

    Sizes are in elements. `lm_head` may name the embedding matrix (tied).
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    attention: AttentionSpec
    rope: RopeSpec
    mlp_bias: bool
    names: WeightNames
