"""Tiny random decoders of every kind, their transformers references and their exported graphs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from mllm_edge.calibration.overflow import widen
from mllm_edge.calibration.recipes import RECIPES, Recipe
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.build import DIALECTS, build_decoder
from mllm_edge.export.decoders.find import decoder_for
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.builder import save_model, tensor_specs
from mllm_edge.graph.datafile import DataFile
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.runtime.backends.base import Session
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.spec import EmbeddingSpec, ModelSpec, Variant

__all__ = [
    "CAPACITY",
    "CONFIGS",
    "LIMIT",
    "SIZES",
    "Opened",
    "assert_close",
    "decoder_spec",
    "describe",
    "open_decoder",
    "open_graph",
    "random_model",
    "random_weights",
    "save_checkpoint",
    "text_config",
    "widen_sums",
]

TOLERANCE = 1e-3
CAPACITY = 64
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Ropes that change with the length do so beyond this one, in the middle of the test's sequence.
LIMIT = 8


def roped(kind: str, **parameters: Any) -> dict[str, Any]:
    """SIZES with a rope of this kind."""
    context = {"max_position_embeddings": LIMIT} if kind == "dynamic" else {}
    return {**SIZES, **context, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def longrope(pairs: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return roped("longrope", **factors, original_max_position_embeddings=LIMIT)


def qwen_vl(config_class: Any, **text: Any) -> Any:
    """A Qwen-VL whose tower is as small as it may be; no test runs it."""
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    tower |= {
        Glm4vConfig: {},
        Qwen2VLConfig: {"embed_dim": 32, "mlp_ratio": 1},
    }.get(config_class, {"deepstack_visual_indexes": [0, 0]})
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    ids = {f"{kind}_token_id": 150 + i for i, kind in enumerate(("image", "video", "vision_start", "vision_end"))}
    return config_class(text_config={**SIZES, "rope_parameters": rope, **text}, vision_config=tower, **ids)


INTERNLM2 = 159  # marks the configuration whose checkpoint is rewritten in InternLM2's layout
GEMMA = {**SIZES, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}
LFM2 = {**SIZES, "num_hidden_layers": 4}
MOE = {"num_experts_per_tok": 2, "attention_bias": False}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=32, tie_word_embeddings=True),
    "mistral_window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_mixed_windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "internlm2": LlamaConfig(**SIZES, pad_token_id=INTERNLM2),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(
        **GEMMA,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "granite": GraniteConfig(
        **SIZES,
        attention_bias=True,
        embedding_multiplier=12.0,
        attention_multiplier=0.1,
        residual_multiplier=0.22,
        logits_scaling=8,
    ),
    "opt": OPTConfig(
        vocab_size=160,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        activation_function="gelu",
    ),
    "linear": LlamaConfig(**roped("linear", factor=3.0)),
    "dynamic": LlamaConfig(**roped("dynamic", factor=3.0)),
    "llama3": LlamaConfig(
        **roped("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=LIMIT)
    ),
    "yarn": LlamaConfig(
        **roped("yarn", factor=16.0, beta_fast=4, beta_slow=0.1, original_max_position_embeddings=LIMIT)
    ),
    "longrope": LlamaConfig(**longrope(8)),
    "persimmon": PersimmonConfig(
        **{**SIZES, "num_key_value_heads": 4, "hidden_size": 128},
        hidden_act="relu2",
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    ),
    "phi3_partial": Phi3Config(
        **{**longrope(8), "hidden_size": 128},
        partial_rotary_factor=0.5,
        original_max_position_embeddings=LIMIT,
        pad_token_id=0,
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[1],
    ),
    "qwen2_moe_renormalized": Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        norm_topk_prob=True,
    ),
    "aria": AriaTextConfig(
        **SIZES,
        moe_num_experts=3,
        moe_topk=2,
        moe_num_shared_experts=2,
        attention_bias=True,
    ),
    "lfm2": Lfm2Config(**LFM2, layer_types=["conv", "full_attention", "conv", "conv"]),
    "lfm2_biased": Lfm2Config(
        **LFM2,
        full_attn_idxs=[0, 2],
        conv_bias=True,
        conv_L_cache=5,
        block_multiple_of=48,
        block_ffn_dim_multiplier=1.5,
        tie_word_embeddings=False,
    ),
    "chameleon": ChameleonConfig(
        **SIZES,
        vocabulary_map={"<image>": 8711, "IMGIMGAZ": 4, "IMGIMGBZ": 90},
        vq_config={"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1], "resolution": 32},
    ),
    "chameleon_swin": ChameleonConfig(
        **SIZES,
        swin_norm=True,
        attention_bias=True,
        vocabulary_map={"<image>": 8711},
        vq_config={"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1], "resolution": 32},
    ),
    "cohere2": Cohere2Config(**SIZES, sliding_window=6, logit_scale=0.5, attention_bias=True),
    "cohere2_types": Cohere2Config(
        **SIZES, sliding_window=5, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "glm4v": qwen_vl(
        Glm4vConfig,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
        },
        hidden_size=128,
        pad_token_id=0,
    ),
    "qwen2_vl": qwen_vl(Qwen2VLConfig),
    "qwen3_vl": qwen_vl(Qwen3VLConfig, head_dim=16),
    "qwen3_vl_moe": qwen_vl(
        Qwen3VLMoeConfig,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        mlp_only_layers=[1],
    ),
}
_CLASSES = {
    "chameleon": ChameleonForConditionalGeneration,
    "glm4v": Glm4vForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
}


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config()


def random_model(config: Any) -> Any:
    """The reference: weights from a fixed seed, larger than the usual initialization, so that greedy is no tie."""
    torch.manual_seed(1)
    if config.model_type in _CLASSES:
        return random_weights(_CLASSES[config.model_type](config))
    return random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def random_weights(model: Any) -> Any:
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        is_norm = "norm" in name and not (name.endswith("bias") or "gemma" in model.config.model_type)
        weight.data = (1 if is_norm else 0) + 0.15 * torch.randn_like(weight)
    model.tie_weights()
    return model.eval()


def saved_model(name: str, folder: Path) -> Any:
    """The random model of a configuration, whose checkpoint is in `folder` afterwards."""
    model = random_model(CONFIGS[name])
    save_checkpoint(model, folder)
    return model


def save_checkpoint(model: Any, folder: Path) -> None:
    """Save the model; one configuration is rewritten in InternLM2's layout, another under today's names."""
    model.save_pretrained(folder)
    if model.config.model_type == "aria_text":
        save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    if model.config.to_dict().get("pad_token_id") == INTERNLM2:
        as_internlm2(folder)


def as_internlm2(folder: Path) -> None:
    """Fuse a Llama checkpoint's q, k and v as InternLM2 does: the same arithmetic, so Llama is its reference."""
    tensors = load_file(folder / "model.safetensors")
    for i in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        query, key, value = (tensors.pop(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv")
        heads = [w.reshape(2, -1, 16, 64) for w in (query, key, value)]  # [key head, its heads, head_dim, hidden]
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = np.concatenate(heads, axis=1).reshape(-1, 64)
    save_file(tensors, folder / "model.safetensors")


def decoder_spec(config: Any, weights: Weights, **options: Any) -> DecoderSpec:
    """The configuration's DecoderSpec with `options`; fails when a value of it was left unread."""
    text = text_config(config)
    values = {k: v for k, v in text.to_dict().items() if k not in ("vision_config", "vq_config", "image_token_id")}
    reader = ConfigReader("config.json", values, type(text)().to_dict())
    prefixes = ("model.language_model", "model.decoder", "model")
    prefix = next(p for p in prefixes if any(name.startswith(f"{p}.layers.") for name in weights))
    kind = "internlm2" if text.to_dict().get("pad_token_id") == INTERNLM2 else text.model_type
    spec = decoder_for(kind, reader, weights, Place(prefix, tied=bool(config.tie_word_embeddings)), "model_type")
    reader.take("max_position_embeddings")
    reader.finish()
    return replace(spec, **options)


@dataclass(frozen=True)
class Opened:
    """A graph on ONNX Runtime's CPU provider."""

    session: Session
    variant: Variant


def open_graph(model: ir.Model, path: Path, dialect: str, kv_mode: Any = None) -> Opened:
    """Save the graph beside its weights and open it."""
    save_model(model, path)
    variant = Variant(
        target="cpu",
        dialect=dialect,  # type: ignore[arg-type]
        precision="float32",
        file=path.name,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
        kv_mode=kv_mode,
        minimum=DIALECTS[dialect].minimum(None),
    )
    return Opened(open_backend("cpu").open(path, variant), variant)


def describe(spec: DecoderSpec) -> ModelSpec:
    """What a manifest would say."""
    return ModelSpec(
        family="test",
        model_type="test",
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        context_length=CAPACITY,
        parameters=0,
        embedding=EmbeddingSpec("", spec.vocab_size),
        positions=spec.position_spec("position_table.npy"),
        state=spec.state_specs(),
        image=None,
    )


def open_decoder(
    spec: DecoderSpec,
    weights: Weights,
    dialect: str,
    folder: Path,
    float_type: ir.DataType = ir.DataType.FLOAT,
    wide: bool = False,
    recipe_name: str = "",
    recipe: Recipe | None = None,
) -> Decoder:
    """Write the decoder's graph into `folder` and open it; weights are of `float_type` unless a recipe is named, or
    given. `wide`: the sums between layers are float32 in a half-precision graph."""
    recipe = recipe or RECIPES[recipe_name or ("fp32" if float_type == ir.DataType.FLOAT else "fp16")]
    folder.mkdir(exist_ok=True)
    with DataFile(folder / "decoder.onnx.data") as data:
        graph = build_decoder(spec, weights, recipe, data, dialect, float_type)
    if wide:
        widen_sums(graph)
    opened = open_graph(graph, folder / "decoder.onnx", dialect, DIALECTS[dialect].kv_mode)
    table = None if spec.table is None else weights.read(spec.table.tensor)[spec.table.skip :]
    decoder = Decoder(opened.session, opened.variant, describe(spec), open_backend("cpu"), table)
    decoder.reset(CAPACITY)
    return decoder


def widen_sums(model: ir.Model) -> None:
    """Let the sums between layers of a half-precision graph be float32, as where they overflow half precision."""
    names = [value.name or "" for node in model.graph for value in node.outputs]
    widen(model, {name: 1e6 for name in names if name.endswith("norm.sum")})


def assert_close(ours: np.ndarray, reference: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """max|a − b| ≤ tolerance × the reference's range; tokens that are never chosen are out of the range."""
    allowed = reference > -1e4
    assert (ours[~allowed] < -1e4).all()
    assert np.abs(ours - reference)[allowed].max() <= tolerance * np.ptp(reference[allowed])
