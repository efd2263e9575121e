"""Persimmon (Fuyu's decoder): layer norms, relu² MLP, partial rope, layer norms on q and k, q, k, v fused per head."""

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.fused import cut_groups
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.graph.decoder_spec import PRE_NORM, AttentionSpec, DecoderSpec, MlpSpec, NormSpec, WeightNames

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("persimmon",)

_LAYER = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.query",
    "k_proj": "self_attn.key",
    "v_proj": "self_attn.value",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "o_proj": "self_attn.dense",
    "post_attention_norm": "post_attention_layernorm",
    "up_proj": "mlp.dense_h_to_4h",
    "down_proj": "mlp.dense_4h_to_h",
}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that has no operators."""
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    if hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}", "check config.json")
    dim = hidden // heads
    norm = NormSpec(config.take("layer_norm_eps"), "layer", bias=True)
    config.take("tie_word_embeddings")
    config.take("hidden_dropout")
    layers = config.take("num_hidden_layers")
    for i in range(layers):
        attention = f"{place.prefix}.layers.{i}.self_attn"
        for kind, row in (("weight", hidden), ("bias", None)):
            parts = {f"{attention}.{part}.{kind}": 1 for part in ("query", "key", "value")}
            cut_groups(weights, f"{attention}.query_key_value.{kind}", parts, heads, dim, row)
    return DecoderSpec(
        stack=(PRE_NORM,) * layers,
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=norm,
        attention=AttentionSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=dim,
            scale=dim**-0.5,
            qkv_bias=True,
            output_bias=True,
            qk_norm=norm if config.take("qk_layernorm") else None,
        ),
        mlp=MlpSpec(config.take("intermediate_size"), config.require("hidden_act", "relu2"), gated=False, bias=True),
        ropes=(rope_spec(config, dim, partial=True),),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.final_layernorm",
            lm_head=place.lm_head(weights),
        ),
    )
