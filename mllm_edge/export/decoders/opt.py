"""OPT: layer norms, learned positions, a plain ReLU MLP, biases everywhere."""

from dataclasses import replace

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import (
    PRE_NORM,
    AttentionSpec,
    DecoderSpec,
    MlpSpec,
    NormSpec,
    PositionTable,
    WeightNames,
)

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("opt",)

# The position table begins with two rows that no token uses.
_POSITION_OFFSET = 2
_EPS = 1e-5  # torch's default, which OPT keeps
_LAYER = {
    "input_norm": "self_attn_layer_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.out_proj",
    "post_attention_norm": "final_layer_norm",
    "up_proj": "fc1",
    "down_proj": "fc2",
}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`, whose prefix ends in `decoder`.

    Raises ConfigError for the variants of OPT-350M (post-norm, projected embeddings), which no other size has.
    """
    config.require("do_layer_norm_before", True)
    config.require("_remove_final_layer_norm", False)
    config.require("layer_norm_elementwise_affine", True)
    bias = config.require("enable_bias", True)
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    if config.take("word_embed_proj_dim", hidden) != hidden:
        raise ConfigError("word_embed_proj_dim differs from hidden_size", "only equal sizes are supported")
    config.take("tie_word_embeddings")
    for inert in ("dropout", "layerdrop", "init_std"):
        config.take(inert)
    activation = config.require("activation_function", "relu", "gelu")
    head_dim = hidden // heads
    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=NormSpec(_EPS, "layer", bias=True),
        attention=AttentionSpec(heads, heads, head_dim, head_dim**-0.5, qkv_bias=bias, output_bias=bias),
        mlp=MlpSpec(config.take("ffn_dim"), activation, gated=False, bias=bias),
        stack=(replace(PRE_NORM, rope=None),) * config.take("num_hidden_layers"),
        table=PositionTable("learned", f"{place.prefix}.embed_positions.weight", skip=_POSITION_OFFSET),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.final_layer_norm",
            lm_head=place.lm_head(weights),
        ),
    )
