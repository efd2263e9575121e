"""LLaVA 1.5 and its relatives: CLIP or SigLIP tower, hidden states from inside it, two-layer connector.

An image is one square tile; in the prompt its placeholder is repeated once per feature.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import (
    SINGLE,
    TEMPLATE,
    drops_first,
    read_llava_processor,
    read_vision,
    single_image_spec,
    tapped_states,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts

__all__ = ["FAMILY"]


def _describe(checkpoint: Checkpoint) -> Parts:
    top = checkpoint.top
    seen = read_vision(checkpoint, drops_first(checkpoint), bias=bool(top.take("multimodal_projector_bias")))
    top.take("image_seq_length")  # neither the reference's model nor its processor reads it
    image = single_image_spec(checkpoint, seen.tile, seen.tokens)
    return Parts(seen.components(checkpoint), image, seen.ignored(checkpoint))


def _load_processor(source: Source) -> Any:
    return read_llava_processor(source, "LlavaProcessor", SINGLE, TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    skip = model.config.vision_feature_select_strategy == "default"
    return tapped_states(model, found, skip), torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="llava",
    model_types=("llava",),
    decoders=("llama", "mistral", "qwen2", "gemma3_text"),
    examples=("llava-hf/llava-1.5-7b-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=with_text_config,
)
