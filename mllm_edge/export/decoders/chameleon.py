"""Chameleon: Llama with layer norms on q and k that differ from head to head; image tokens are never answered."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import Branch, DecoderSpec, NormSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("chameleon",)

_EPS = 1e-5  # fixed in the source model, whatever the configuration says
_SWIN = (Branch("attention", post="input_norm"), Branch("mlp", post="post_attention_norm"))
_IMAGE_PREFIX = "IMGIMG"


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`; with `swin_norm` (34B) norms stand behind the branches. Errors as in `llama`."""
    config.require("model_parallel_size", 1)
    swin = bool(config.take("swin_norm", False))
    plain = llama.spec(config, weights, place, model_type)
    qk_norm = NormSpec(_EPS, "layer", bias=True, per_head=True)
    vocabulary = config.take("vocabulary_map") or {}
    return replace(
        plain,
        attention=replace(plain.attention, qk_norm=qk_norm),
        stack=tuple(replace(layer, branches=_SWIN) for layer in plain.stack) if swin else plain.stack,
        banned=tuple(sorted(number for name, number in vocabulary.items() if name.startswith(_IMAGE_PREFIX))),
    )
