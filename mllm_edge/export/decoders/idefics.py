"""IDEFICS: before some of Llama's layers stand gated ones that look at the last image before a token."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import PRE_NORM, AttentionSpec, Branch, CrossSpec, DecoderSpec, LayerSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("idefics",)

# A token that sees no image has nothing of the attention, and all of the MLP.
_CROSS = LayerSpec(
    (
        Branch("cross_attention", pre="input_norm", gate="attention_gate", silenced=True),
        Branch("mlp", pre="post_attention_norm", gate="mlp_gate"),
    ),
    rope=None,
)
_LAYER = {
    "input_norm": "input_layernorm.weight",
    **{f"{part}_proj": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    "post_attention_norm": "post_attention_layernorm.weight",
    **{f"{part}_proj": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
_CROSSING = {
    **{f"cross_{part}_proj": f"cross_attn.{part}_proj.weight" for part in "qkvo"},
    **{part: name for part, name in _LAYER.items() if not name.startswith("self_attn.")},
}
_NORMS = {f"cross_{part}_norm": f"cross_attn.{part}_layer_norm.weight" for part in "qk"}
_GATES = {"attention_gate": "alpha_cross_attn", "mlp_gate": "alpha_dense"}
# How training began, and what it left as it was.
_INERT = (
    *("alpha_initializer", "alphas_initializer_range", "alpha_type", "dropout"),
    *(f"freeze_{part}" for part in ("text_layers", "text_module_exceptions", "lm_head")),
    *(f"freeze_{part}" for part in ("vision_layers", "vision_module_exceptions")),
)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`.

    Layers of both kinds are one stack here, whose tensors get the names of their places in it. Embeddings and head are
    stored as two tensors each, of which the second has the words that were added."""
    for inert in _INERT:
        config.take(inert)
    plain = llama.spec(config, weights, place, model_type)
    every, normed = config.positive("cross_layer_interval"), bool(config.take("qk_layer_norms"))
    if plain.layers % every:
        raise ConfigError(f"config.json: cross_layer_interval {every}, but {plain.layers} layers", OWN_CONFIG)
    added, head = config.take("additional_vocab_size"), plain.names.lm_head
    if added:
        weights.extend(place.embedding, f"{place.prefix}.embed_tokens.additional_embedding.weight")
    if added and f"{head}.weight" != place.embedding:
        weights.extend(f"{head}.weight", f"{head}.additional_fc.weight")
    crossing, stack = {**_CROSSING, **_GATES, **(_NORMS if normed else {})}, list[LayerSpec]()
    for i in range(plain.layers):
        if i % every == 0:
            _place(weights, f"{place.prefix}.gated_cross_attn_layers.{i // every}", crossing, len(stack))
            stack.append(_CROSS)
        _place(weights, f"{place.prefix}.layers.{i}", _LAYER, len(stack))
        stack.append(PRE_NORM)
    attention = plain.attention
    cross = AttentionSpec(attention.heads, attention.heads, attention.head_dim, attention.scale)
    names = {part: _name("{i}", part) for part in (*_LAYER, *crossing)}
    return replace(
        plain,
        vocab_size=plain.vocab_size + added,
        names=replace(plain.names, layer=names),
        stack=tuple(stack),
        cross=CrossSpec(replace(cross, qk_norm=plain.norm if normed else None), _width(weights, place), rows=True),
    )


def _name(i: int | str, part: str) -> str:
    """What a part of the stack's layer i is called here."""
    return f"stack.{i}.{part}"


def _place(weights: Weights, source: str, parts: Mapping[str, str], i: int) -> None:
    for part, name in parts.items():
        stored = f"{source}.{name}"
        weight = ".weight" if name.endswith(".weight") else ""
        weights.derive(f"{_name(i, part)}{weight}", stored, weights.shape(stored), _as_it_is)


def _as_it_is(stored: np.ndarray) -> np.ndarray:
    return stored


def _width(weights: Weights, place: Place) -> int:
    """Of the features that are looked at."""
    return weights.shape(f"{place.prefix}.gated_cross_attn_layers.0.cross_attn.k_proj.weight")[-1]
