"""InternLM2: Llama's arithmetic under other names, with q, k and v in one weight, grouped by key head."""

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.fused import cut_groups
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["MODEL_TYPES", "RENAMES", "spec"]

MODEL_TYPES = ("internlm2",)
# The original code's names → Llama's; wqkv has no counterpart there.
RENAMES = (
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention\.wqkv\.", ".self_attn.qkv_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`, its tensors under Llama's names; errors as in `llama`.

    q, k and v are cut from self_attn.qkv_proj, whose rows are, for each key head in turn, its group of query heads, the
    key head and the value head.
    """
    config.require("bias", False)
    plain = llama.spec(config, weights, place, "llama")
    attention = plain.attention
    heads = {"q": attention.heads // attention.kv_heads, "k": 1, "v": 1}
    for i in range(plain.layers):
        layer = f"{place.prefix}.layers.{i}.self_attn"
        parts = {f"{layer}.{part}_proj.weight": n for part, n in heads.items()}
        fused = f"{layer}.qkv_proj.weight"
        cut_groups(weights, fused, parts, attention.kv_heads, attention.head_dim, plain.hidden_size)
    return plain
