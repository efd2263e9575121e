"""Mixtures of experts in a Llama frame: Mixtral, and Qwen2-MoE with an expert that every token shares."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, LayerSpec, MoeSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("mixtral", "qwen2_moe")

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


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`."""
    plain = llama.spec(config, weights, place, model_type)
    return (_mixtral if model_type == "mixtral" else _qwen2_moe)(config, plain, place)


def _mixtral(config: ConfigReader, plain: DecoderSpec, place: Place) -> DecoderSpec:
    """The softmax over all experts, the largest few renormalized."""
    moe = MoeSpec(config.take("num_local_experts"), config.take("num_experts_per_tok"), plain.mlp.inner)
    return _with_experts(config, plain, place, moe, _MIXTRAL, range(plain.layers))


def _qwen2_moe(config: ConfigReader, plain: DecoderSpec, place: Place) -> DecoderSpec:
    """Some layers may stay dense; the shared expert has a gate of its own."""
    moe = MoeSpec(
        experts=config.take("num_experts"),
        top_k=config.take("num_experts_per_tok"),
        inner=config.take("moe_intermediate_size"),
        renormalize=bool(config.take("norm_topk_prob", False)),
        shared_inner=config.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    dense, step = config.take("mlp_only_layers") or (), config.take("decoder_sparse_step", 1)
    sparse = [i for i in range(plain.layers) if i not in dense and moe.experts and (i + 1) % step == 0]
    return _with_experts(config, plain, place, moe, _QWEN2_MOE, sparse)


def _with_experts(
    config: ConfigReader,
    plain: DecoderSpec,
    place: Place,
    moe: MoeSpec,
    names: dict[str, str],
    sparse: "range | list[int]",
) -> DecoderSpec:
    for inert in _INERT:
        config.take(inert)
    layer = {part: name.replace("{{e}}", "{e}") for part, name in place.layer(names).items()}
    stack = tuple(replace(old, branches=_MOE.branches) if i in sparse else old for i, old in enumerate(plain.stack))
    return replace(plain, moe=moe, stack=stack, names=replace(plain.names, layer={**plain.names.layer, **layer}))
