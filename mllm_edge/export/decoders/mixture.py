"""Mixtures of experts in a Llama frame: Mixtral, Qwen2-MoE with an expert that every token shares, and the text models
of Qwen3-VL-MoE and Aria, whose experts are stored as one tensor."""

from dataclasses import replace

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.fused import cut_experts
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, LayerSpec, MoeSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("aria_text", "mixtral", "qwen2_moe", "qwen3_vl_moe_text")

_MOE = LayerSpec((Branch("attention", pre="input_norm"), Branch("moe", pre="post_attention_norm")))
_MIXTRAL = {
    "router": "block_sparse_moe.gate",
    "expert_gate_proj": "block_sparse_moe.experts.{{e}}.w1",
    "expert_up_proj": "block_sparse_moe.experts.{{e}}.w3",
    "expert_down_proj": "block_sparse_moe.experts.{{e}}.w2",
}
_QWEN3_MOE = {
    "router": "mlp.gate",
    **{f"expert_{part}_proj": f"mlp.experts.{{{{e}}}}.{part}_proj" for part in ("gate", "up", "down")},
}
_QWEN2_MOE = {
    **_QWEN3_MOE,
    **{f"shared_{part}_proj": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "shared_router": "mlp.shared_expert_gate",
}
_ARIA = {
    **_QWEN3_MOE,
    "router": "mlp.router",
    **{f"shared_{part}_proj": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}
_PARTS = ("gate", "up", "down")
# Losses and noise of training.
_INERT = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; errors as in `llama`."""
    plain = llama.spec(config, weights, place, model_type)
    if model_type in ("aria_text", "qwen3_vl_moe_text"):
        return (_aria if model_type == "aria_text" else _qwen3_moe)(config, plain, place, weights)
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
    return _with_experts(config, plain, place, moe, _QWEN2_MOE, _sparse(config, plain.layers, moe.experts))


def _qwen3_moe(config: ConfigReader, plain: DecoderSpec, place: Place, weights: Weights) -> DecoderSpec:
    """The largest few renormalized, nothing shared; the experts of a layer are two tensors, cut here by expert."""
    moe = MoeSpec(
        *_chosen(config, "num_local_experts", "num_experts_per_tok"), config.positive("moe_intermediate_size")
    )
    sparse = _sparse(config, plain.layers, moe.experts)
    found = _with_experts(config, plain, place, moe, _QWEN3_MOE, sparse)
    _cut(weights, place, found, moe, sparse)
    return found


def _aria(config: ConfigReader, plain: DecoderSpec, place: Place, weights: Weights) -> DecoderSpec:
    """The softmax over the largest few, which is theirs over all, renormalized; several shared experts are one wide
    one. A layer's experts are two tensors, each expert's columns its outputs."""
    config.require("mlp_bias", False)
    inner, shared = plain.mlp.inner, config.positive("moe_num_shared_experts")
    moe = MoeSpec(*_chosen(config, "moe_num_experts", "moe_topk"), inner, shared_inner=shared * inner)
    found = _with_experts(config, plain, place, moe, _ARIA, range(plain.layers))
    _cut(weights, place, found, moe, range(plain.layers), turned=True)
    return found


def _chosen(config: ConfigReader, experts: str, top_k: str) -> tuple[int, int]:
    """How many experts there are, and how many of them a token takes."""
    count, taken = config.positive(experts), config.positive(top_k)
    if taken > count:
        raise ConfigError(f"text_config: {top_k} {taken} of {count} experts", OWN_CONFIG)
    return count, taken


def _cut(
    weights: Weights,
    place: Place,
    found: DecoderSpec,
    moe: MoeSpec,
    sparse: "range | list[int]",
    turned: bool | None = None,
) -> None:
    """Name each expert's part of a layer's two tensors."""
    width, parts = found.hidden_size, {k: f"{found.names.layer[f'expert_{k}_proj']}.weight" for k in _PARTS}
    for i in sparse:
        gate, up, down = (parts[k].replace("{i}", str(i)) for k in _PARTS)
        stored = f"{place.prefix}.layers.{i}.mlp.experts"
        both = {gate: moe.inner, up: moe.inner}
        cut_experts(weights, f"{stored}.gate_up_proj", both, moe.experts, width, turned)
        cut_experts(weights, f"{stored}.down_proj", {down: width}, moe.experts, moe.inner, turned)


def _sparse(config: ConfigReader, layers: int, experts: int) -> list[int]:
    """Qwen's layers with experts."""
    dense, step = config.take("mlp_only_layers") or (), config.take("decoder_sparse_step", 1)
    return [i for i in range(layers) if i not in dense and experts and (i + 1) % step == 0]


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
