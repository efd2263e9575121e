"""What a decoder is made of: the frozen description that the graph is built from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mllm_edge.spec import RopeSpec

__all__ = ["Activation", "AttentionSpec", "DecoderSpec", "MlpSpec", "NormSpec", "WeightNames"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class WeightNames:
    """Where each tensor stands in the checkpoint. In `layer` values `{i}` is the layer number, without `.weight`."""

    layer: Mapping[str, str]
    final_norm: str
    lm_head: str


@dataclass(frozen=True)
class NormSpec:
    """`rms` or `layer` normalization over the last axis; `bias` adds a learned offset (layer only)."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention. `scale` multiplies q·k; `qk_norm` normalizes each head of q and k before rope; `window` is the
    number of latest positions a token sees, itself included (None: all before it)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None


@dataclass(frozen=True)
class MlpSpec:
    """down(act(gate(x)) · up(x)) when `gated`, else down(act(up(x))); `inner` is the width between."""

    inner: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm transformer decoder with grouped-query attention.

    Sizes are in elements. `rope` None: positions come with the embeddings. `lm_head` may name the embedding matrix
    (tied).
    """

    layers: int
    hidden_size: int
    vocab_size: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    rope: RopeSpec | None
    names: WeightNames
