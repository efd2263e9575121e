"""What a decoder is made of: the frozen description that the graph is built from."""

from collections.abc import Mapping
from dataclasses import dataclass

from mllm_edge.spec import RopeSpec

__all__ = ["DecoderSpec", "WeightNames"]


@dataclass(frozen=True)
class WeightNames:
    """Where each tensor stands in the checkpoint. In `layer` values `{i}` is the layer number, without `.weight`."""

    layer: Mapping[str, str]
    final_norm: str
    lm_head: str


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm transformer decoder with RMS norms, grouped-query attention, rope and a gated SiLU MLP (Llama).

    Sizes are in elements. `lm_head` may name the embedding matrix (tied). Biases are per kind of projection.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    names: WeightNames
