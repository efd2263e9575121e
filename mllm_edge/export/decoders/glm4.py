"""GLM-4V's decoder: norms before and behind each branch, a rope of neighbouring pairs in half of a head, gate and up as
one."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.fused import cut_rows, part_pairs
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("glm4v_text",)

_SANDWICH = (
    Branch("attention", pre="input_norm", post="post_attention_norm"),
    Branch("mlp", pre="pre_mlp_norm", post="post_mlp_norm"),
)
_LAYER = {
    "q_proj": "self_attn.q_parted",
    "k_proj": "self_attn.k_parted",
    "post_attention_norm": "post_self_attn_layernorm",
    "pre_mlp_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_mlp_layernorm",
}


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`."""
    plain = llama.spec(config, weights, place, model_type)
    attention, hidden = plain.attention, plain.hidden_size
    turned = plain.ropes[0].dim
    for i in range(plain.layers):
        layer = f"{place.prefix}.layers.{i}"
        for part, heads in (("q", attention.heads), ("k", attention.kv_heads)):
            name = f"{layer}.self_attn.{part}"
            part_pairs(weights, f"{name}_proj", f"{name}_parted", heads, attention.head_dim, hidden, True, turned)
        halves = {f"{layer}.mlp.{part}_proj.weight": plain.mlp.inner for part in ("gate", "up")}
        cut_rows(weights, f"{layer}.mlp.gate_up_proj.weight", halves, hidden)
    return replace(
        plain,
        stack=tuple(replace(layer, branches=_SANDWICH) for layer in plain.stack),
        names=replace(plain.names, layer={**plain.names.layer, **place.layer(_LAYER)}),
    )
