"""InstructBLIP: BLIP-2 whose Q-Former reads the prompt's text, in tokens of its own, beside each image; Llama decoder.

An image is stretched to one tile, and becomes one token per query. A prompt has no turns: images, the token that begins
a text, the text.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError, SourceError
from mllm_edge.export.checkpoint.processing import read_tokenizer
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts
from mllm_edge.export.families.qformer_parts import (
    VISION,
    QFormerVision,
    answering,
    load_complete,
    qformer_texts,
    read,
    text_start,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent, tile_components
from mllm_edge.export.reference import load_reference
from mllm_edge.graph.ranges import TILES
from mllm_edge.spec import StageText, SymbolRange, TensorSpec

__all__ = ["FAMILY"]

_FOLDER, _IDS, _MASK = "qformer_tokenizer", "qformer_input_ids", "qformer_attention_mask"
_FILE = f"{_FOLDER}.json"
# Of a conversation, which the model was not trained for, all that was said.
_TOLD = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{{ '\n' if add_generation_prompt and messages | length > 1 else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    seen = read(checkpoint)
    processor, qformer = checkpoint.processor, seen.qformer
    last = max(processor.qformer_tokenizer.get_vocab().values())
    if last >= qformer.words:
        raise ConfigError(
            f"{checkpoint.source.folder / _FOLDER}: token ids reach {last}, but qformer_config's vocab_size is "
            f"{qformer.words}",
            "use the tokenizers that belong to this model",
        )
    bos = processor.tokenizer.bos_token or ""
    without = tuple(dict.fromkeys(filter(None, (bos + text_start(processor.tokenizer, processor.image_token), bos))))
    image = replace(seen.image_spec(checkpoint), text=StageText(_IDS, _FILE, qformer.places, without))
    # Behind the last layer nobody looks at the text.
    behind = f"qformer.encoder.layer.{qformer.layers - 1}."
    return Parts(_traced(checkpoint, seen), image, (f"{behind}intermediate.", f"{behind}output."))


def _traced(checkpoint: Checkpoint, seen: QFormerVision) -> tuple[TracedComponent, TracedComponent]:
    from mllm_edge.export.vision.qformer import TextQFormerConnector

    tower, qformer, text_hidden = seen.tower, seen.qformer, checkpoint.decoder.hidden_size
    encoder, connector = tile_components(
        seen.encoder,
        lambda: TextQFormerConnector(qformer, text_hidden),
        (tower.channels, tower.tile, tower.tile),
        (seen.patches, tower.hidden_size),
        (qformer.queries, text_hidden),
        (VISION, ""),
        seen.derived(checkpoint),
    )
    text = TensorSpec(_IDS, "int64", ("tiles", "words"))
    ranges = {"tiles": TILES, "words": SymbolRange(usual=min(32, qformer.places), most=qformer.places)}
    return encoder, replace(connector, inputs=(*connector.inputs, text), ranges=ranges)


def _load_processor(source: Source) -> Any:
    from transformers import InstructBlipProcessor

    if not (source.folder / _FOLDER / "tokenizer.json").is_file():
        raise SourceError(
            f"{source.folder}: no {_FOLDER}/tokenizer.json, and the Q-Former reads the prompt's text",
            "copy the folder of the Q-Former's tokenizer beside config.json",
        )
    further = {_FOLDER: read_tokenizer(source, subfolder=_FOLDER)}
    return load_complete(source, InstructBlipProcessor, _TOLD, further)


def _texts(checkpoint: Checkpoint) -> Texts:
    core = checkpoint.processor.qformer_tokenizer.backend_tokenizer
    return replace(qformer_texts(checkpoint), further={_FILE: core})


def _load_model(source: Source, decoder_layers: int | None) -> Any:
    from transformers import InstructBlipForConditionalGeneration

    return load_reference(source, decoder_layers, answering(InstructBlipForConditionalGeneration, _IDS, _MASK))


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    given = {name: inputs[name] for name in ("pixel_values", _IDS, _MASK)}
    found = model.get_image_features(**given, return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="instructblip",
    model_types=("instructblip",),
    decoders=("llama",),
    examples=("Salesforce/instructblip-vicuna-7b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    load_model=_load_model,
    text="language_model.model",
    head="language_model.lm_head",
    texts=_texts,
)
