"""Llama and its nearest relatives (Mistral, Phi-3, Qwen2, Qwen3, the text models of Qwen-VL) to DecoderSpec."""

from dataclasses import dataclass
from typing import Literal

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.export.decoders.stack import mixed_windows, windowed
from mllm_edge.graph.decoder_spec import PRE_NORM, AttentionSpec, DecoderSpec, MlpSpec, NormSpec, WeightNames

__all__ = ["MODEL_TYPES", "spec"]

_LAYER = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o_proj": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Kind:
    """What sets a model type apart. A bias is always there, never, or as the configuration says (None).

    `windowed`: every layer has the window, without being asked. `mrope`: the layout of positions on three axes.
    """

    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool = False
    windowed: bool = False
    partial_rope: bool = False
    mrope: Literal["sectioned", "interleaved"] | None = None


_KINDS = {
    "aria_text": _Kind(qkv_bias=None, output_bias=None),
    "chameleon": _Kind(qkv_bias=None, output_bias=None),
    "emu3_text_model": _Kind(qkv_bias=None, output_bias=None),
    "glm4v_text": _Kind(qkv_bias=True, partial_rope=True, mrope="sectioned"),
    "granite": _Kind(qkv_bias=None, output_bias=None),
    "idefics": _Kind(),
    "llama": _Kind(qkv_bias=None, output_bias=None),
    "mistral": _Kind(windowed=True),
    "mixtral": _Kind(windowed=True),
    "mllama_text_model": _Kind(),
    "phi3": _Kind(windowed=True, partial_rope=True),
    "qwen2": _Kind(qkv_bias=True),
    "qwen2_moe": _Kind(qkv_bias=True),
    "qwen2_vl_text": _Kind(qkv_bias=True, mrope="sectioned"),
    "qwen3": _Kind(qkv_bias=None, output_bias=None, qk_norm=True),
    "qwen3_vl_moe_text": _Kind(qkv_bias=None, output_bias=None, qk_norm=True, mrope="interleaved"),
    "qwen3_vl_text": _Kind(qkv_bias=None, output_bias=None, qk_norm=True, mrope="interleaved"),
}


MODEL_TYPES = ("emu3_text_model", "llama", "mistral", "qwen2", "qwen2_vl_text", "qwen3", "qwen3_vl_text")


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that this decoder has no operators for."""
    kind = _KINDS[model_type]
    config.require("hidden_act", "silu")
    config.require("pretraining_tp", 1)
    # Of no effect here: whether the head is tied is decided by the model that contains this decoder.
    config.take("tie_word_embeddings")
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    head_dim = config.take("head_dim", hidden // heads)
    biased = bool(config.take("attention_bias", False))
    norm = NormSpec(config.take("rms_norm_eps"))
    windows, indices = _windows(config, kind, config.take("num_hidden_layers"))
    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=norm,
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.take("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=biased if kind.qkv_bias is None else kind.qkv_bias,
            output_bias=biased if kind.output_bias is None else kind.output_bias,
            qk_norm=norm if kind.qk_norm else None,
        ),
        ropes=(rope_spec(config, head_dim, partial=kind.partial_rope, mrope=kind.mrope),),
        windows=windows,
        stack=windowed(PRE_NORM, indices),
        mlp=MlpSpec(config.take("intermediate_size"), bias=bool(config.take("mlp_bias", False))),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.norm",
            lm_head=place.lm_head(weights),
        ),
    )


def _windows(config: ConfigReader, kind: _Kind, layers: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Windows, and each layer's: one for all, or (Qwen) only where the configuration asks for it."""
    window, switched = config.take("sliding_window"), config.take("use_sliding_window", False)
    types, full = config.take("layer_types"), config.take("max_window_layers", layers)
    if kind.windowed:
        return (window,), (0,) * layers
    if not switched or window is None:
        return (None,), (0,) * layers
    return mixed_windows(
        types or ["full_attention" if i < full else "sliding_attention" for i in range(layers)], window
    )
