"""Llama 3.2 Vision: between Llama's layers stand gated ones that look at the image instead of the text before."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import PRE_NORM, AttentionSpec, Branch, CrossSpec, DecoderSpec, LayerSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("mllama_text_model",)

_CROSS = LayerSpec(
    (
        Branch("cross_attention", pre="input_norm", gate="attention_gate"),
        Branch("mlp", pre="post_attention_norm", gate="mlp_gate", silenced=True),
    ),
    rope=None,
)
_LAYER = {
    **{f"cross_{part}_proj": f"cross_attn.{part}_proj" for part in "qkvo"},
    **{f"cross_{part}_norm": f"cross_attn.{part}_norm" for part in "qk"},
    "attention_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`.

    Features come projected to the hidden size. The embedding has rows for more tokens than the head projects to.
    """
    config.require("hidden_activation", "silu")
    config.take("dropout")
    crossing = set(config.take("cross_attention_layers"))
    plain = llama.spec(config, weights, place, model_type)
    attention = plain.attention
    cross = AttentionSpec(attention.heads, attention.kv_heads, attention.head_dim, attention.scale, qk_norm=plain.norm)
    return replace(
        plain,
        names=replace(plain.names, layer={**plain.names.layer, **place.layer(_LAYER)}),
        stack=tuple(_CROSS if i in crossing else PRE_NORM for i in range(plain.layers)),
        cross=CrossSpec(cross, plain.hidden_size, rows=True),
    )
