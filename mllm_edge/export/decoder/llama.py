"""Llama and its nearest relatives (Mistral, Qwen2, Qwen3): configuration to DecoderSpec."""

from dataclasses import dataclass
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.decoder.spec import AttentionSpec, DecoderSpec, WeightNames
from mllm_edge.export.safetensors import Weights
from mllm_edge.export.source import ConfigReader
from mllm_edge.spec import RopeSpec

__all__ = ["LLAMA_LIKE", "llama_spec"]

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
    """What sets a model type apart. A bias is always there, never, or as the configuration says (None)."""

    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool = False
    windowed: bool = False


LLAMA_LIKE = {
    "llama": _Kind(qkv_bias=None, output_bias=None),
    "mistral": _Kind(windowed=True),
    "qwen2": _Kind(qkv_bias=True),
    "qwen3": _Kind(qkv_bias=None, output_bias=None, qk_norm=True),
}


def llama_spec(
    config: ConfigReader, weights: Weights, prefix: str, tied: bool, model_type: str = "llama"
) -> DecoderSpec:
    """The decoder whose tensors stand under `prefix` (without a final dot).

    A tied checkpoint may store the head as well; then the stored one counts, as in transformers.
    Raises ConfigError for a value that this decoder has no operators for.
    """
    kind = LLAMA_LIKE[model_type]
    config.require("hidden_act", "silu")
    config.require("pretraining_tp", 1)
    # Of no effect here: whether the head is tied is decided by the model that contains this decoder.
    config.take("tie_word_embeddings")
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    head_dim = config.take("head_dim", hidden // heads)
    if head_dim % 8:
        raise ConfigError(f"head_dim = {head_dim} is not a multiple of 8", "GroupQueryAttention needs multiples of 8")
    biased = bool(config.take("attention_bias", False))
    head = "lm_head" if "lm_head.weight" in weights or not tied else f"{prefix}.embed_tokens"
    return DecoderSpec(
        layers=config.take("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=config.take("intermediate_size"),
        vocab_size=config.take("vocab_size"),
        norm_eps=config.take("rms_norm_eps"),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.take("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=biased if kind.qkv_bias is None else kind.qkv_bias,
            output_bias=biased if kind.output_bias is None else kind.output_bias,
            qk_norm=kind.qk_norm,
            window=_window(config, kind),
        ),
        rope=_rope(config, head_dim),
        mlp_bias=bool(config.take("mlp_bias", False)),
        names=WeightNames(
            layer={part: f"{prefix}.layers.{{i}}.{name}" for part, name in _LAYER.items()},
            final_norm=f"{prefix}.norm",
            lm_head=head,
        ),
    )


def _window(config: ConfigReader, kind: _Kind) -> int | None:
    """The same window in all layers or none: Qwen's mixed layers are refused, not approximated."""
    window = config.take("sliding_window")
    config.take("max_window_layers")
    config.take("layer_types")
    if kind.windowed:
        return window
    config.require("use_sliding_window", False)
    return None


def _rope(config: ConfigReader, head_dim: int) -> RopeSpec:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    values = dict(config.take("rope_parameters") or config.take("rope_scaling") or {})
    theta = values.pop("rope_theta", None) or config.take("rope_theta", 10000.0)
    kind: Any = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in known:
        raise ConfigError(f"rope_type = {kind!r} is not supported", f"supported: {', '.join(known)}")
    missing = [k for k in known[kind] if k not in values]
    extra = [k for k in values if k not in known[kind]]
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has {extra[0]} = {values[extra[0]]!r}, which nothing handles"
        raise ConfigError(f"rope_parameters of type {kind} {problem}", "check config.json for a mistake")
    return RopeSpec(
        theta=float(theta),
        dim=head_dim,
        kind=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_positions=int(values.get("original_max_position_embeddings", 0)),
    )
