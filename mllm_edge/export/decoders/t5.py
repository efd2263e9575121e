"""T5: an encoder and a decoder that attends to it, RMS norms, no biases, positions as scores of relative distance."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import (
    Activation,
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

__all__ = ["MODEL_TYPES", "spec", "t5_specs"]

MODEL_TYPES = ("t5",)

_ENCODER = LayerSpec((Branch("attention", pre="input_norm"), Branch("mlp", pre="mlp_norm")), rope=None)
_DECODER = LayerSpec(
    (
        Branch("attention", pre="input_norm"),
        Branch("cross_attention", pre="cross_norm"),
        Branch("mlp", pre="mlp_norm"),
    ),
    rope=None,
)
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`, with the text encoder before it; raises ConfigError as `t5_specs`."""
    encoder, decoder = t5_specs(config, weights, f"{place.prefix}." if place.prefix else "")
    names = replace(decoder.names, lm_head=place.lm_head(weights, encoder.embedding))
    return replace(decoder, names=names, encoder=encoder)


def t5_specs(config: ConfigReader, weights: Weights, prefix: str = "") -> tuple[EncoderSpec, DecoderSpec]:
    """Encoder and decoder whose tensors stand under `prefix` (with its final dot); both share the embedding `shared`.

    Raises ConfigError for an activation that has no operators.
    """
    hidden, heads, dim = config.take("d_model"), config.take("num_heads"), config.take("d_kv")
    norm = NormSpec(config.take("layer_norm_epsilon"))
    # Scores are not scaled: the initialization of the weights took care of that.
    attention = AttentionSpec(heads, heads, dim, 1.0)
    mlp = _mlp(config)
    scaled = bool(config.take("scale_decoder_outputs", True))
    distance = config.take("relative_attention_max_distance")
    for inert in ("dropout_rate", "initializer_factor", "classifier_dropout", "tie_word_embeddings"):
        config.take(inert)
    config.take("relative_attention_num_buckets")  # the table's own number of rows says it
    head = "lm_head" if f"{prefix}lm_head.weight" in weights else "shared"

    def table(side: str) -> PositionTable:
        tensor = f"{prefix}{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return PositionTable("relative_bias", tensor, max_distance=distance)

    encoder_layers, decoder_layers = config.take("num_layers"), config.take("num_decoder_layers")
    encoder = EncoderSpec(
        hidden_size=hidden,
        norm=norm,
        attention=attention,
        mlp=mlp,
        names=_names(f"{prefix}encoder", mlp, 1, ""),
        stack=(_ENCODER,) * encoder_layers,
        embedding=f"{prefix}shared.weight",
        copies=tuple(f"{prefix}{name}.embed_tokens.weight" for name in ("encoder", "decoder")),
        table=table("encoder"),
    )
    decoder = DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=norm,
        attention=attention,
        mlp=mlp,
        names=_names(f"{prefix}decoder", mlp, 2, f"{prefix}{head}"),
        stack=(_DECODER,) * (decoder_layers or encoder_layers),
        table=table("decoder"),
        cross=CrossSpec(attention, hidden),
        head_scale=hidden**-0.5 if scaled else 1.0,
    )
    return encoder, decoder


def _mlp(config: ConfigReader) -> MlpSpec:
    # transformers makes the two of feed_forward_proj, unless they are stated beside it, as in BLIP-2's Flan-T5.
    activation = _ACTIVATIONS[config.require("dense_act_fn", *_ACTIVATIONS)]
    config.take("feed_forward_proj")
    return MlpSpec(config.take("d_ff"), activation, gated=bool(config.take("is_gated_act")))


def _names(prefix: str, mlp: MlpSpec, last: int, head: str) -> WeightNames:
    block = f"{prefix}.block.{{i}}.layer"
    layer = {f"{part}_proj": f"{block}.0.SelfAttention.{part}" for part in "qkvo"}
    layer |= {f"cross_{part}_proj": f"{block}.1.EncDecAttention.{part}" for part in "qkvo"}
    layer |= {"input_norm": f"{block}.0.layer_norm", "cross_norm": f"{block}.1.layer_norm"}
    dense = f"{block}.{last}.DenseReluDense"
    layer |= {"mlp_norm": f"{block}.{last}.layer_norm", "down_proj": f"{dense}.wo"}
    layer |= {"gate_proj": f"{dense}.wi_0", "up_proj": f"{dense}.wi_1" if mlp.gated else f"{dense}.wi"}
    return WeightNames(layer, f"{prefix}.final_layer_norm", head)
