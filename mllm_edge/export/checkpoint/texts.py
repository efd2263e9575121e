"""What the device reads as text, as transformers' processor has it: tokenizer, chat template, generation settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mllm_edge.export.checkpoint.contradictions import tell_image_settings, tell_tokens
from mllm_edge.export.checkpoint.generation import generation_spec
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.tokenizers import JSON, load_tokenizer
from mllm_edge.spec import GenerationSpec

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Texts", "read_texts"]


@dataclass(frozen=True)
class Texts:
    """`tokenizer` becomes the bundle's tokenizer.json; `further`: other tokenizers of the bundle, by file."""

    tokenizer: "tokenizers.Tokenizer"
    chat_template: str
    generation: GenerationSpec
    further: Mapping[str, "tokenizers.Tokenizer"] = field(default_factory=dict)


def read_texts(source: Source, processor: Any, text_config: Mapping[str, Any]) -> Texts:
    """The texts of a processor that transformers has loaded from the folder; notices tell where its files contradict
    each other. Raises ConfigError or SourceError for settings of no use."""
    tokenizer = processor.tokenizer
    tell_image_settings(source)
    tell_tokens(source, tokenizer)
    # A converted tokenizer is the one that was compared with its original.
    stored = (source.folder / JSON).is_file()
    core = tokenizer.backend_tokenizer if stored else load_tokenizer(source)
    return Texts(core, processor.chat_template, generation_spec(source, text_config, tokenizer))
