"""Cohere 2 (Aya Vision's decoder): attention and MLP beside each other behind one norm, layers with a window and a rope
of neighbouring pairs between layers that see all and have none."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.fused import part_pairs
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.export.decoders.stack import mixed_windows, windowed
from mllm_edge.graph.decoder_spec import AttentionSpec, Branch, DecoderSpec, LayerSpec, MlpSpec, NormSpec, WeightNames

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("cohere2",)

_BESIDE = LayerSpec((Branch("attention", pre="input_norm"), Branch("mlp", pre="input_norm", beside=True)))
_LAYER = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_parted",
    "k_proj": "self_attn.k_parted",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that has no operators."""
    config.require("hidden_act", "silu")
    config.take("tie_word_embeddings")
    hidden, heads = config.heads()
    head_dim, kv_heads = config.take("head_dim", hidden // heads), config.take("num_key_value_heads", heads)
    layers, bias = config.take("num_hidden_layers"), bool(config.take("attention_bias", False))
    windows, indices = mixed_windows(config.take("layer_types"), config.take("sliding_window"))
    stack = windowed(_BESIDE, indices)
    for i in range(layers):
        for part, count in (("q", heads), ("k", kv_heads)):
            name = f"{place.prefix}.layers.{i}.self_attn.{part}"
            part_pairs(weights, f"{name}_proj", f"{name}_parted", count, head_dim, hidden, bias)
    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=NormSpec(config.take("layer_norm_eps"), "layer"),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(config.take("intermediate_size")),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.norm",
            lm_head=place.lm_head(weights),
        ),
        stack=tuple(layer if windows[layer.window] else replace(layer, rope=None) for layer in stack),
        ropes=(rope_spec(config, head_dim),),
        windows=windows,
        head_scale=config.take("logit_scale"),
    )
