"""BART (Florence-2's language model): norms behind the sums, learned positions, biases everywhere."""

from dataclasses import replace
from typing import Any

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import (
    AttentionSpec,
    Branch,
    CrossSpec,
    DecoderSpec,
    EncoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    PositionTable,
    WeightNames,
)

__all__ = ["MODEL_TYPES", "bart_specs", "spec"]

MODEL_TYPES = ("bart",)

# The position tables begin with two rows that no token uses.
_POSITION_OFFSET = 2
_EPS = 1e-5  # torch's default, which BART keeps
_ENCODER = LayerSpec((Branch("attention", after="attention_norm"), Branch("mlp", after="mlp_norm")), rope=None)
_DECODER = LayerSpec(
    (
        Branch("attention", after="attention_norm"),
        Branch("cross_attention", after="cross_norm"),
        Branch("mlp", after="mlp_norm"),
    ),
    rope=None,
)
_LAYER = {
    **{f"{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "o_proj": "self_attn.out_proj",
    **{f"cross_{part}_proj": f"encoder_attn.{part}_proj" for part in "qkv"},
    "cross_o_proj": "encoder_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
_ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "relu": "relu"}
_INERT = (
    "dropout",
    "activation_dropout",
    "classifier_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "init_std",
    "num_labels",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "decoder_start_token_id",
    "num_hidden_layers",
    "is_decoder",
)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`, with the text encoder before it; raises ConfigError as `bart_specs`."""
    encoder, decoder = bart_specs(config, weights, place.prefix)
    scale = decoder.hidden_size**0.5 if config.take("scale_embedding") else 1.0
    names = replace(decoder.names, lm_head=place.lm_head(weights, encoder.embedding))
    return replace(decoder, names=names, encoder=encoder, embedding_scale=scale)


def bart_specs(config: ConfigReader, weights: Weights, prefix: str = "model") -> tuple[EncoderSpec, DecoderSpec]:
    """Encoder and decoder under `prefix`, which share the embedding `shared`.

    With `scale_embedding` embeddings are to be multiplied by √d_model (`EmbeddingSpec.scale`). Raises ConfigError for a
    value that has no operators.
    """
    for inert in _INERT:
        config.take(inert)
    config.require("tie_word_embeddings", True)  # both sides have the same embeddings
    hidden = config.take("d_model")
    activation = _ACTIVATIONS[config.require("activation_function", *_ACTIVATIONS)]
    norm = NormSpec(_EPS, "layer", bias=True)

    def side(name: str) -> dict[str, Any]:
        heads, at = config.take(f"{name}_attention_heads"), f"{prefix}.{name}"
        dim = hidden // heads
        return {
            "hidden_size": hidden,
            "norm": norm,
            "attention": AttentionSpec(heads, heads, dim, dim**-0.5, qkv_bias=True, output_bias=True),
            "mlp": MlpSpec(config.take(f"{name}_ffn_dim"), activation, gated=False, bias=True),
            "names": WeightNames(
                layer={part: f"{at}.layers.{{i}}.{tensor}" for part, tensor in _LAYER.items()},
                final_norm=None,
                lm_head="lm_head" if "lm_head.weight" in weights else f"{prefix}.shared",
                input_norm=f"{at}.layernorm_embedding",
            ),
            "table": PositionTable("learned", f"{at}.embed_positions.weight", skip=_POSITION_OFFSET),
        }

    layers = config.take("encoder_layers")
    encoder = EncoderSpec(
        **side("encoder"),
        stack=(_ENCODER,) * layers,
        embedding=f"{prefix}.shared.weight",
        copies=tuple(f"{prefix}.{name}.embed_tokens.weight" for name in ("encoder", "decoder")),
    )
    shared = side("decoder")
    decoder = DecoderSpec(
        **shared,
        vocab_size=config.take("vocab_size"),
        stack=(_DECODER,) * config.take("decoder_layers"),
        cross=CrossSpec(shared["attention"], hidden),
        head_bias="final_logits_bias" if "final_logits_bias" in weights else None,
    )
    return encoder, decoder
