"""BLIP-2: EVA tower, a Q-Former whose learned queries look at it, OPT decoder or Flan-T5.

An image is stretched to one tile, and becomes one token per query. A prompt has no turns: images, the token that begins
a text, questions and answers.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.qformer_parts import TEXT, VISION, answering, load_complete, qformer_texts, read
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.export.reference import load_reference

__all__ = ["FAMILY"]

# The form that the authors ask questions in; nothing is asked by an empty text.
_TOLD = (
    "{% set turns %}{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'text' and part['text'] %}"
    "{{ ' Answer: ' if message['role'] == 'assistant' else ' Question: ' }}{{ part['text'] }}"
    "{% endfor %}{% endfor %}{% endset %}{{ turns | trim }}{{ ' Answer:' if add_generation_prompt and turns else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.qformer import QFormerConnector

    seen, text_hidden = read(checkpoint), checkpoint.decoder.hidden_size
    tower, qformer = seen.tower, seen.qformer
    traced = tile_components(
        seen.encoder,
        lambda: QFormerConnector(qformer, text_hidden),
        (tower.channels, tower.tile, tower.tile),
        (seen.patches, tower.hidden_size),
        (qformer.queries, text_hidden),
        (VISION, ""),
        seen.derived(checkpoint),
    )
    return Parts(traced, seen.image_spec(checkpoint, checkpoint.processor.image_token))


def _load_processor(source: Source) -> Any:
    from transformers import Blip2Processor

    return load_complete(source, Blip2Processor, _TOLD)


def _load_model(source: Source, decoder_layers: int | None) -> Any:
    from transformers import Blip2ForConditionalGeneration

    return load_reference(source, decoder_layers, answering(Blip2ForConditionalGeneration))


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="blip_2",
    model_types=("blip-2",),
    decoders=("opt", "t5"),
    examples=("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xl"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    load_model=_load_model,
    text=TEXT,
    head="language_model.lm_head",
    texts=qformer_texts,
)
