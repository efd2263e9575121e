"""Mixtures of experts in a Llama frame: Mixtral, and Qwen2-MoE with an expert that every token shares."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, LayerSpec, MoeSpec

__all__ = ["mixtral_spec", "qwen2_moe_spec"]

_MOE = LayerSpec((Branch("attention", pre="input_norm"), Branch("moe", pre="post_attention_norm")))
_MIXTRAL = {
    "router": "block_sparse_moe.gate",
    "expert_gate_proj": "block_sparse_moe.experts.{{e}}.w1",
    "expert_up_proj": "block_sparse_moe.experts.{{e}}.w3",
    "expert_down_proj": "block_sparse_moe.experts.{{e}}.w2",
}
_QWEN2_MOE = {
    "router": "mlp.gate",
    **{f"expert_{part}_proj": f"mlp.experts.{{{{e}}}}.{part}_proj" for part in ("gate", "up", "down")},
    **{f"shared_{part}_proj": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "shared_router": "mlp.shared_expert_gate",
}
# Losses and noise of training.
_INERT = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")


def mixtral_spec(config: ConfigReader, weights: Weights, prefix: str, tied: bool) -> DecoderSpec:
    """Mixtral: the softmax over all experts, the largest few renormalized; errors as in `llama_spec`."""
    spec = llama_spec(config, weights, prefix, tied, "mixtral")
    moe = MoeSpec(config.take("num_local_experts"), config.take("num_experts_per_tok"), spec.mlp.inner)
    return _with_experts(config, spec, prefix, moe, _MIXTRAL, range(spec.layers))


def qwen2_moe_spec(config: ConfigReader, weights: Weights, prefix: str, tied: bool) -> DecoderSpec:
    """Qwen2-MoE: some layers may stay dense; the shared expert has a gate of its own."""
    spec = llama_spec(config, weights, prefix, tied, "qwen2_moe")
    moe = MoeSpec(
        experts=config.take("num_experts"),
        top_k=config.take("num_experts_per_tok"),
        inner=config.take("moe_intermediate_size"),
        renormalize=bool(config.take("norm_topk_prob", False)),
        shared_inner=config.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    dense, step = config.take("mlp_only_layers") or (), config.take("decoder_sparse_step", 1)
    sparse = [i for i in range(spec.layers) if i not in dense and moe.experts and (i + 1) % step == 0]
    return _with_experts(config, spec, prefix, moe, _QWEN2_MOE, sparse)


def _with_experts(
    config: ConfigReader,
    spec: DecoderSpec,
    prefix: str,
    moe: MoeSpec,
    names: dict[str, str],
    sparse: "range | list[int]",
) -> DecoderSpec:
    for inert in _INERT:
        config.take(inert)
    layer = {part: f"{prefix}.layers.{{i}}.{name}".replace("{{e}}", "{e}") for part, name in names.items()}
    stack = tuple(replace(old, branches=_MOE.branches) if i in sparse else old for i, old in enumerate(spec.stack))
    return replace(spec, moe=moe, stack=stack, names=replace(spec.names, layer={**spec.names.layer, **layer}))
