"""What InstructBLIP for images and for videos share: a Q-Former that reads the prompt's text beside each picture."""

from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError, SourceError
from mllm_edge.export.checkpoint.processing import read_tokenizer
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts
from mllm_edge.export.families.qformer_parts import VISION, QFormerVision, qformer_texts, read
from mllm_edge.export.family import Checkpoint, Parts
from mllm_edge.export.plan import TracedComponent, tile_components
from mllm_edge.graph.ranges import TILES
from mllm_edge.spec import StageText, SymbolRange, TensorSpec

__all__ = ["IDS", "MASK", "TEXT", "TOLD", "describe", "instructblip_texts", "second_tokenizer"]

_FOLDER, IDS, MASK = "qformer_tokenizer", "qformer_input_ids", "qformer_attention_mask"
_FILE = f"{_FOLDER}.json"
# Where the decoder stands, by its type.
TEXT = {"llama": "language_model.model", "t5": "language_model"}
# Of a conversation, which the model was not trained for, all that was said.
TOLD = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{{ '\n' if add_generation_prompt and messages | length > 1 else '' }}"
)


def describe(checkpoint: Checkpoint, token: str, placeholder: str = "") -> Parts:
    """`token`: that of a picture's features; `placeholder`: see `ImagePrompt`."""
    seen = read(checkpoint)
    processor, qformer = checkpoint.processor, seen.qformer
    last = max(processor.qformer_tokenizer.get_vocab().values())
    if last >= qformer.words:
        raise ConfigError(
            f"{checkpoint.source.folder / _FOLDER}: token ids reach {last}, but qformer_config's vocab_size is "
            f"{qformer.words}",
            "use the tokenizers that belong to this model",
        )
    bos, eos = processor.tokenizer.bos_token or "", processor.tokenizer.eos_token
    without = tuple(dict.fromkeys(filter(None, (bos + processor.text_start, bos, "" if bos else eos))))
    text = StageText(IDS, _FILE, qformer.places, without)
    image = replace(seen.image_spec(checkpoint, token, placeholder), text=text)
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
    text = TensorSpec(IDS, "int64", ("tiles", "words"))
    ranges = {"tiles": TILES, "words": SymbolRange(usual=min(32, qformer.places), most=qformer.places)}
    return encoder, replace(connector, inputs=(*connector.inputs, text), ranges=ranges)


def second_tokenizer(source: Source) -> dict[str, Any]:
    """transformers' tokenizer for the Q-Former, by its name; raises SourceError for a folder without one."""
    if not (source.folder / _FOLDER / "tokenizer.json").is_file():
        raise SourceError(
            f"{source.folder}: no {_FOLDER}/tokenizer.json, and the Q-Former reads the prompt's text",
            "copy the folder of the Q-Former's tokenizer beside config.json",
        )
    return {_FOLDER: read_tokenizer(source, subfolder=_FOLDER)}


def instructblip_texts(checkpoint: Checkpoint) -> Texts:
    """With the second tokenizer."""
    core = checkpoint.processor.qformer_tokenizer.backend_tokenizer
    return replace(qformer_texts(checkpoint), further={_FILE: core})
