"""Llama 3.2 Vision: between Llama's layers stand gated ones that look at the image instead of the text before."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.graph.decoder_spec import PRE_NORM, AttentionSpec, Branch, CrossSpec, DecoderSpec, LayerSpec

__all__ = ["mllama_spec"]

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


def mllama_spec(config: ConfigReader, weights: Weights, prefix: str, head: str = "lm_head") -> DecoderSpec:
    """The decoder under `prefix`; errors as in `llama_spec`.

    Features come projected to the hidden size. The embedding has rows for more tokens than the head projects to.
    """
    config.require("hidden_activation", "silu")
    config.take("dropout")
    crossing = set(config.take("cross_attention_layers"))
    spec = llama_spec(config, weights, prefix, False, "mllama_text_model", head)
    attention = spec.attention
    cross = AttentionSpec(attention.heads, attention.kv_heads, attention.head_dim, attention.scale, qk_norm=spec.norm)
    layer = {part: f"{prefix}.layers.{{i}}.{name}" for part, name in _LAYER.items()}
    return replace(
        spec,
        names=replace(spec.names, layer={**spec.names.layer, **layer}),
        stack=tuple(_CROSS if i in crossing else PRE_NORM for i in range(spec.layers)),
        cross=CrossSpec(cross, spec.hidden_size, rows=True),
    )
