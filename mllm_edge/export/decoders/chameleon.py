"""Chameleon: Llama with layer norms on q and k that differ from head to head; image tokens are never answered."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, NormSpec

__all__ = ["chameleon_spec"]

_EPS = 1e-5  # fixed in the source model, whatever the configuration says
_SWIN = (Branch("attention", post="input_norm"), Branch("mlp", post="post_attention_norm"))
_IMAGE_PREFIX = "IMGIMG"


def chameleon_spec(config: ConfigReader, weights: Weights, prefix: str, tied: bool) -> DecoderSpec:
    """The decoder under `prefix`; with `swin_norm` (34B) norms stand behind the branches. Errors as in `llama_spec`."""
    config.require("model_parallel_size", 1)
    swin = bool(config.take("swin_norm", False))
    spec = llama_spec(config, weights, prefix, tied, "chameleon")
    qk_norm = NormSpec(_EPS, "layer", bias=True, per_head=True)
    vocabulary = config.take("vocabulary_map") or {}
    return replace(
        spec,
        attention=replace(spec.attention, qk_norm=qk_norm),
        stack=tuple(replace(layer, branches=_SWIN) for layer in spec.stack) if swin else spec.stack,
        banned=tuple(sorted(number for name, number in vocabulary.items() if name.startswith(_IMAGE_PREFIX))),
    )
