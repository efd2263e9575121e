"""InternLM2: Llama's arithmetic under other names, with q, k and v in one weight, grouped by key head."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.fused import cut_groups
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.graph.decoder_spec import DecoderSpec, WeightNames

__all__ = ["internlm2_spec"]

_LAYER = {
    "input_norm": "attention_norm",
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "post_attention_norm": "ffn_norm",
    "gate_proj": "feed_forward.w1",
    "up_proj": "feed_forward.w3",
    "down_proj": "feed_forward.w2",
}


def internlm2_spec(config: ConfigReader, weights: Weights, prefix: str, head: str = "output") -> DecoderSpec:
    """The decoder under `prefix`; `head` names the projection onto the vocabulary.

    The checkpoint has no wq, wk and wv: they are cut from attention.wqkv, whose rows are, for each key head in turn,
    its group of query heads, the key head and the value head.
    """
    config.require("bias", False)
    spec = llama_spec(config, weights, prefix, tied=False)
    attention = spec.attention
    heads = {"q": attention.heads // attention.kv_heads, "k": 1, "v": 1}
    for i in range(spec.layers):
        layer = f"{prefix}.layers.{i}.attention"
        parts = {f"{layer}.w{part}.weight": n for part, n in heads.items()}
        cut_groups(weights, f"{layer}.wqkv.weight", parts, attention.kv_heads, attention.head_dim, spec.hidden_size)
    names = {part: f"{prefix}.layers.{{i}}.{name}" for part, name in _LAYER.items()}
    return replace(spec, names=WeightNames(names, f"{prefix}.norm", head))
