"""Phi-3: Llama with q, k, v in one weight and gate, up in another."""

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.fused import cut_rows
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("phi3",)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`."""
    for inert in ("embd_pdrop", "resid_pdrop"):
        config.take(inert)
    plain = llama.spec(config, weights, place, model_type)
    dim = plain.attention.head_dim
    heads = {"q": plain.attention.heads, "k": plain.attention.kv_heads, "v": plain.attention.kv_heads}
    for i in range(plain.layers):
        attention, mlp = (f"{place.prefix}.layers.{i}.{part}" for part in ("self_attn", "mlp"))
        projections = {f"{attention}.{part}_proj.weight": n * dim for part, n in heads.items()}
        cut_rows(weights, f"{attention}.qkv_proj.weight", projections, plain.hidden_size)
        halves = {f"{mlp}.{part}_proj.weight": plain.mlp.inner for part in ("gate", "up")}
        cut_rows(weights, f"{mlp}.gate_up_proj.weight", halves, plain.hidden_size)
    return plain
