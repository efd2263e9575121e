"""Tokenizer, chat template and generation settings of a checkpoint, and whether they fit the weights."""

from collections.abc import Iterable, Mapping, Sequence

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.generation import generation_spec
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.tokenizers import load_tokenizer, vocabulary_file
from mllm_edge.spec import GenerationSpec, ModelSpec

__all__ = ["chat_template", "check_generation", "check_vocabulary", "generation_spec", "require_words", "vocabulary"]

_UNWRITTEN = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def vocabulary(source: Source) -> Mapping[str, int]:
    """Token → id, added tokens included; raises SourceError when there is no usable tokenizer."""
    return load_tokenizer(source).get_vocab(with_added_tokens=True)


def require_words(source: Source, tokens: Iterable[str]) -> None:
    """Raise ConfigError unless the tokenizer has each of these special tokens."""
    vocab, path = vocabulary(source), vocabulary_file(source)
    for token in tokens:
        if token not in vocab:
            raise ConfigError(f"{path}: the special token {token} is missing", f"use this model's own {path.name}")


def check_vocabulary(source: Source, numbered: Mapping[str, int], others: Sequence[str], vocab_size: int) -> None:
    """Raise ConfigError unless the tokenizer has all special tokens that images use (those of `numbered` with the ids
    that config.json states) and no id beyond `vocab_size`, but for those of `numbered`: they are read, never chosen."""
    require_words(source, (*numbered, *others))
    vocab, path = vocabulary(source), vocabulary_file(source)
    for token, number in numbered.items():
        if vocab[token] != number:
            raise ConfigError(
                f"{path}: {token} has id {vocab[token]}, but config.json says image_token_id = {number}",
                f"use the {path.name} that belongs to this model",
            )
    last = max(number for token, number in vocab.items() if token not in numbered)
    if last >= vocab_size:
        raise ConfigError(
            f"{path}: token ids reach {last}, but vocab_size is {vocab_size}",
            f"use the {path.name} that belongs to this model",
        )


def check_generation(source: Source, generation: GenerationSpec, model: ModelSpec) -> None:
    """Raise ConfigError unless every id that can be read has an embedding, stop ids are ids, and the tokens that
    templates write are in the vocabulary."""
    vocab, config = vocabulary(source), source.folder / "tokenizer_config.json"
    last, rows = max(vocab.values()), model.embedding.rows
    if last >= rows:
        raise ConfigError(
            f"{source.folder}: the tokenizer's ids reach {last}, but there are embeddings for {rows} only",
            "use the tokenizer that belongs to these weights",
        )
    for number in generation.eos_token_ids:
        if not 0 <= number < model.vocab_size:
            raise ConfigError(
                f"{source.folder}: eos_token_id {number} is no id of the vocabulary of {model.vocab_size}: "
                "an answer would never end",
                "correct eos_token_id in generation_config.json",
            )
    for name, token in generation.special_tokens.items():
        # The others are names that no prompt needs; transformers makes ids of its own for them.
        if name not in _UNWRITTEN and token and token not in vocab:
            raise ConfigError(
                f"{config}: {name} = {token!r} is not in the vocabulary", "use the tokenizer's files of this model"
            )
