"""LFM2: short convolutions in most layers, attention with normalized heads in the others."""

from collections.abc import Sequence

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.fused import cut_rows
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.decoders.rope import rope_spec
from mllm_edge.graph.decoder_spec import (
    PRE_NORM,
    AttentionSpec,
    Branch,
    ConvSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    WeightNames,
)

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("lfm2",)

_LAYERS = {
    "conv": LayerSpec((Branch("conv", pre="input_norm"), Branch("mlp", pre="post_attention_norm")), rope=None),
    "full_attention": PRE_NORM,
}
_LAYER = {
    "input_norm": "operator_norm",
    "conv_b_proj": "conv.b_proj",
    "conv_c_proj": "conv.c_proj",
    "conv_x_proj": "conv.x_proj",
    "conv": "conv.conv",
    "conv_out_proj": "conv.out_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "o_proj": "self_attn.out_proj",
    "post_attention_norm": "ffn_norm",
    "gate_proj": "feed_forward.w1",
    "up_proj": "feed_forward.w3",
    "down_proj": "feed_forward.w2",
}
# Older files name what the reference does not look at, or has under another name as well.
_INERT = (
    "block_dim",
    "block_mlp_init_scale",
    "block_norm_eps",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_dim",
    "conv_dim_out",
    "conv_use_xavier_init",
    "num_heads",
    "tie_embedding",
    "tie_word_embeddings",
)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that this decoder has no operators for."""
    for inert in _INERT:
        config.take(inert)
    config.require("block_use_swiglu", True)
    config.require("use_pos_enc", True)
    hidden, heads = config.take("hidden_size"), config.take("num_attention_heads")
    head_dim = config.take("head_dim", hidden // heads)
    norm = NormSpec(config.take("norm_eps"))
    conv = _convolution(config)
    found = DecoderSpec(
        hidden_size=hidden,
        vocab_size=config.take("vocab_size"),
        norm=norm,
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.take("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qk_norm=norm,
        ),
        conv=conv,
        ropes=(rope_spec(config, head_dim),),
        stack=tuple(_LAYERS[kind] for kind in _kinds(config)),
        mlp=MlpSpec(_inner(config)),
        names=WeightNames(
            layer=place.layer(_LAYER),
            final_norm=f"{place.prefix}.embedding_norm",
            lm_head=place.lm_head(weights),
        ),
    )
    for i, layer in enumerate(found.stack):
        if layer.has("conv"):
            _cut(weights, f"{place.prefix}.layers.{i}.conv", conv.bias, hidden)
    return found


def _convolution(config: ConfigReader) -> ConvSpec:
    width = config.take("conv_L_cache")
    if width < 2:
        raise ConfigError(f"conv_L_cache = {width}: a convolution over one token", "it is 3 in every published model")
    return ConvSpec(width, bool(config.take("conv_bias", False)))


def _kinds(config: ConfigReader) -> Sequence[str]:
    """Each layer's kind, by name or by the numbers of those with attention."""
    count, whole = config.take("num_hidden_layers"), config.take("full_attn_idxs")
    attends = range(count) if whole is None else whole
    kinds = config.take("layer_types") or ["full_attention" if i in attends else "conv" for i in range(count)]
    for kind in kinds:
        if kind not in _LAYERS:
            raise ConfigError(f"layer_types: {kind!r} is not supported", f"supported: {', '.join(_LAYERS)}")
    return kinds


def _inner(config: ConfigReader) -> int:
    """The MLP's width: as it stands there, or two thirds of it, scaled and rounded up to a multiple."""
    width = int(config.take("block_ff_dim") or config.take("intermediate_size"))
    config.take("intermediate_size")
    scale, multiple = config.take("block_ffn_dim_multiplier", 1.0), config.take("block_multiple_of", 256)
    if not config.take("block_auto_adjust_ff_dim", True):
        return width
    return multiple * -(-int(scale * int(2 * width / 3)) // multiple)


def _cut(weights: Weights, name: str, bias: bool, hidden: int) -> None:
    """The three thirds of a convolution's input projection, each under a name of its own."""
    parts = [f"{name}.{part}_proj" for part in "bcx"]
    cut_rows(weights, f"{name}.in_proj.weight", {f"{part}.weight": hidden for part in parts}, hidden)
    if bias:
        cut_rows(weights, f"{name}.in_proj.bias", {f"{part}.bias": hidden for part in parts}, None)
