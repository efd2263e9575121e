"""Gemma 1, 2 and 3: scales stored minus one, scaled embeddings, GELU, windows in some layers.

Gemma 2 adds norms behind each branch and caps on scores and logits; Gemma 3 has norms of q and k instead of the cap on
scores, and another rope in its windowed layers.
"""

from dataclasses import dataclass, replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.export.decoders.stack import mixed_windows, windowed
from mllm_edge.graph.decoder_spec import (
    PRE_NORM,
    AttentionSpec,
    Branch,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    WeightNames,
)
from mllm_edge.spec import RopeSpec

__all__ = ["MODEL_TYPES", "spec"]

_SANDWICH = LayerSpec(
    (
        Branch("attention", pre="input_norm", post="post_attention_norm"),
        Branch("mlp", pre="pre_mlp_norm", post="post_mlp_norm"),
    )
)
_LAYER = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Kind:
    """What sets a generation apart."""

    layer: LayerSpec
    qk_norm: bool = False
    two_ropes: bool = False


_KINDS = {
    "gemma": _Kind(PRE_NORM),
    "gemma2": _Kind(_SANDWICH),
    "gemma3_text": _Kind(_SANDWICH, qk_norm=True, two_ropes=True),
}


MODEL_TYPES = tuple(_KINDS)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that has no operators."""
    kind = _KINDS[model_type]
    if config.take("use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention = True is an encoder", "only decoders are exported")
    config.take("tie_word_embeddings")
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    head_dim = config.take("head_dim", hidden // heads)
    norm = NormSpec(config.take("rms_norm_eps"), offset=1.0)
    bias = bool(config.take("attention_bias", False))
    layers = config.take("num_hidden_layers")
    types = config.take("layer_types") or ["full_attention"] * layers
    windows, indices = mixed_windows(types, config.take("sliding_window"))
    ropes, turned = _ropes(config, head_dim, types, kind)
    stack = tuple(replace(layer, rope=rope) for layer, rope in zip(windowed(kind.layer, indices), turned, strict=True))
    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=norm,
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.take("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=config.take("query_pre_attn_scalar", head_dim) ** -0.5,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=norm if kind.qk_norm else None,
            softcap=config.take("attn_logit_softcapping"),
        ),
        mlp=MlpSpec(config.take("intermediate_size"), _activation(config)),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.norm",
            lm_head=place.lm_head(weights),
        ),
        stack=stack,
        ropes=ropes,
        windows=windows,
        embedding_scale=hidden**0.5,
        logits_cap=config.take("final_logit_softcapping"),
    )


def _activation(config: ConfigReader) -> Any:
    """`hidden_activation`; the older `hidden_act` of the first checkpoints said gelu and meant the tanh form."""
    config.take("hidden_act")
    config.require("hidden_activation", "gelu_pytorch_tanh", "gelu_new")
    return "gelu_tanh"


def _ropes(
    config: ConfigReader, head_dim: int, types: list[str], kind: _Kind
) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """The ropes, and which one each layer has: one for all, or (Gemma 3) one for each type of layer."""
    if not kind.two_ropes:
        return (rope_spec(config, head_dim),), (0,) * len(types)
    parameters = config.take("rope_parameters")
    context = {"max_position_embeddings": config.take("max_position_embeddings")}
    names = tuple(dict.fromkeys(types))
    ropes = tuple(
        rope_spec(
            ConfigReader(f"rope_parameters.{name}", {"rope_parameters": parameters[name], **context}, {}), head_dim
        )
        for name in names
    )
    return ropes, tuple(names.index(kind) for kind in types)
