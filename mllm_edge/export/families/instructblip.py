"""InstructBLIP: BLIP-2 whose Q-Former reads the prompt's text, in tokens of its own, beside each image; a Llama decoder
or Flan-T5.

An image is stretched to one tile, and becomes one token per query. A prompt has no turns: images, the token that begins
a text, the text.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.instructblip_parts import (
    IDS,
    MASK,
    TEXT,
    TOLD,
    describe,
    instructblip_texts,
    second_tokenizer,
)
from mllm_edge.export.families.qformer_parts import answering, load_complete
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.reference import load_reference

__all__ = ["FAMILY"]


def _describe(checkpoint: Checkpoint) -> Parts:
    return describe(checkpoint, checkpoint.processor.image_token)


def _load_processor(source: Source) -> Any:
    from transformers import InstructBlipProcessor

    return load_complete(source, InstructBlipProcessor, TOLD, second_tokenizer(source))


def _load_model(source: Source, decoder_layers: int | None) -> Any:
    from transformers import InstructBlipForConditionalGeneration

    return load_reference(source, decoder_layers, answering(InstructBlipForConditionalGeneration, IDS, MASK))


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    given = {name: inputs[name] for name in ("pixel_values", IDS, MASK)}
    found = model.get_image_features(**given, return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="instructblip",
    model_types=("instructblip",),
    decoders=("llama", "t5"),
    examples=("Salesforce/instructblip-vicuna-7b", "Salesforce/instructblip-flan-t5-xl"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    load_model=_load_model,
    text=TEXT,
    head="language_model.lm_head",
    texts=instructblip_texts,
)
