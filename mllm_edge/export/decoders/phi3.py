"""Phi-3: Llama with q, k, v in one weight and gate, up in another."""

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.fused import cut_rows
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["phi3_spec"]


def phi3_spec(config: ConfigReader, weights: Weights, prefix: str, tied: bool) -> DecoderSpec:
    """The decoder under `prefix`; errors as in `llama_spec`."""
    for inert in ("embd_pdrop", "resid_pdrop"):
        config.take(inert)
    spec = llama_spec(config, weights, prefix, tied, "phi3")
    dim = spec.attention.head_dim
    heads = {"q": spec.attention.heads, "k": spec.attention.kv_heads, "v": spec.attention.kv_heads}
    for i in range(spec.layers):
        attention, mlp = f"{prefix}.layers.{i}.self_attn", f"{prefix}.layers.{i}.mlp"
        projections = {f"{attention}.{part}_proj.weight": n * dim for part, n in heads.items()}
        cut_rows(weights, f"{attention}.qkv_proj.weight", projections, spec.hidden_size)
        halves = {f"{mlp}.{part}_proj.weight": spec.mlp.inner for part in ("gate", "up")}
        cut_rows(weights, f"{mlp}.gate_up_proj.weight", halves, spec.hidden_size)
    return spec
