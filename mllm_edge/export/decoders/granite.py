"""Granite: a Llama whose embeddings, attention, branches and logits have multipliers of their own."""

from dataclasses import replace

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.decoders import llama
from mllm_edge.export.decoders.place import Place
from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["MODEL_TYPES", "spec"]

MODEL_TYPES = ("granite",)


def spec(config: ConfigReader, weights: Weights, place: Place, model_type: str) -> DecoderSpec:
    """The decoder at `place`. Raises ConfigError for a value that this decoder has no operators for."""
    found = llama.spec(config, weights, place, model_type)
    return replace(
        found,
        attention=replace(found.attention, scale=float(config.take("attention_multiplier"))),
        embedding_scale=float(config.take("embedding_multiplier")),
        residual_scale=float(config.take("residual_multiplier")),
        head_scale=1 / float(config.take("logits_scaling")),
    )
