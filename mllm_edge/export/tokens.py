"""Tokenizer, chat template and generation settings of a checkpoint, as the device reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.source import Source
from mllm_edge.export.tokenizers import load_tokenizer, vocabulary_file
from mllm_edge.spec import GenerationSpec, ModelSpec

__all__ = ["chat_template", "check_generation", "check_vocabulary", "generation_spec", "vocabulary"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_UNWRITTEN = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def vocabulary(source: Source) -> Mapping[str, int]:
    """Token → id, added tokens included; raises SourceError when there is no usable tokenizer."""
    return load_tokenizer(source).get_vocab(with_added_tokens=True)


def check_vocabulary(source: Source, numbered: Mapping[str, int], others: Sequence[str], vocab_size: int) -> None:
    """Raise ConfigError unless the tokenizer has all special tokens that images use (those of `numbered` with the ids
    that config.json states) and no id beyond `vocab_size`."""
    vocab = vocabulary(source)
    path = vocabulary_file(source)
    for token in (*numbered, *others):
        if token not in vocab:
            raise ConfigError(f"{path}: the special token {token} is missing", f"use this model's own {path.name}")
    for token, number in numbered.items():
        if vocab[token] != number:
            raise ConfigError(
                f"{path}: {token} has id {vocab[token]}, but config.json says image_token_id = {number}",
                f"use the {path.name} that belongs to this model",
            )
    if max(vocab.values()) >= vocab_size:
        raise ConfigError(
            f"{path}: token ids reach {max(vocab.values())}, but vocab_size is {vocab_size}",
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


def chat_template(source: Source, fallback: str) -> str:
    """The checkpoint's chat template: its own file, or a field of one of its configurations, or `fallback`.

    Of several named templates it is the one named default. Raises ConfigError when there is none of that name.
    """
    path = source.folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = source.json(name).get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}
        if isinstance(template, dict):
            template = _default(source.folder / name, template)
        if template:
            return str(template)
    return fallback


def _default(path: Path, templates: Mapping[str, str]) -> str:
    if "default" not in templates:
        raise ConfigError(
            f"{path}: none of the chat templates ({', '.join(templates)}) is named default",
            f"put the one to use into {path.parent / 'chat_template.jinja'}",
        )
    return templates["default"]


def generation_spec(source: Source, text_config: Mapping[str, Any]) -> GenerationSpec:
    """Stop ids from generation_config.json, else from the text configuration; special tokens for the template."""
    settings = source.json("generation_config.json")
    eos = settings.get("eos_token_id", text_config.get("eos_token_id"))
    tokenizer = source.json("tokenizer_config.json")
    special = {name: _content(tokenizer[name]) for name in _SPECIAL if tokenizer.get(name)}
    extra = tokenizer.get("extra_special_tokens")
    if isinstance(extra, dict):  # image_token and the like, which templates may read as well
        special |= {name: _content(token) for name, token in extra.items()}
    if not special:
        special = _special_from_map(source.folder / "special_tokens_map.json")
    return GenerationSpec(
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_token_id=settings.get("bos_token_id", text_config.get("bos_token_id")),
        pad_token_id=settings.get("pad_token_id", text_config.get("pad_token_id")),
        special_tokens=special,
    )


def _special_from_map(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {name: _content(data[name]) for name in _SPECIAL if data.get(name)}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
