"""Files of one folder that say different things: a notice for each, with what transformers took."""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.source import Source

__all__ = ["tell_image_settings", "tell_tokens"]

_NESTED, _OWN = "processor_config.json", "preprocessor_config.json"
_MAP, _CONFIG, _TOKENIZER = "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"
# Names of classes and of what has no effect on pixels.
_LABELS = (
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "data_format",
    "return_tensors",
)


def tell_image_settings(source: Source) -> None:
    """Settings of the image processor that processor_config.json and preprocessor_config.json state differently."""
    nested, own = source.json(_NESTED).get("image_processor"), source.json(_OWN)
    if not isinstance(nested, Mapping) or not own:
        return
    differing = [
        key
        for key, value in own.items()
        if key not in _LABELS and value is not None and nested.get(key) is not None and nested[key] != value
    ]
    if differing:
        shown = ", ".join(f"{key} ({nested[key]!r}, {own[key]!r})" for key in differing[:4])
        source.notices.add(
            f"{source.folder}: {_NESTED} and {_OWN} differ in {shown}{' and more' if len(differing) > 4 else ''}; "
            f"{_NESTED} counts, as in transformers"
        )


def tell_tokens(source: Source, tokenizer: Any) -> None:
    """Special tokens that the tokenizer's files name differently, and those that only transformers' reading adds."""
    stated = {name: source.json(name) for name in (_MAP, _CONFIG)}
    for name, taken in tokenizer.special_tokens_map.items():
        values = {file: _content(data.get(name)) for file, data in stated.items()}
        others = {file: value for file, value in values.items() if value is not None and value != taken}
        if others:
            used = next((file for file, value in values.items() if value == taken), "transformers' own default")
            said = " and ".join(f"{file} says {value!r}" for file, value in others.items())
            source.notices.add(
                f"{source.folder}: {name} is {taken!r} by {used}, as transformers reads it; {said} and is not read: "
                "if that was saved last, correct the other file"
            )
    _tell_ids(source, stated[_CONFIG])
    _tell_added(source, tokenizer)


def _tell_ids(source: Source, config: Mapping[str, Any]) -> None:
    """Ids that tokenizer_config.json gives to other tokens than tokenizer.json."""
    named, stored = config.get("added_tokens_decoder"), source.json(_TOKENIZER).get("added_tokens")
    if not isinstance(named, Mapping) or not isinstance(stored, list):
        return
    contents = {str(token.get("id")): token.get("content") for token in stored if isinstance(token, Mapping)}
    differing = [i for i, token in named.items() if i in contents and _content(token) != contents[i]]
    if differing:
        i = differing[0]
        source.notices.add(
            f"{source.folder}: id {i} is {_content(named[i])!r} in {_CONFIG} and {contents[i]!r} in {_TOKENIZER}"
            f"{f' ({len(differing)} such ids)' if len(differing) > 1 else ''}"
        )


def _tell_added(source: Source, tokenizer: Any) -> None:
    """Tokens that no file numbers: transformers gives them the next free ids, for which nothing was trained."""
    if not (source.folder / _TOKENIZER).is_file():
        return
    from mllm_edge.export.checkpoint.tokenizers import load_tokenizer

    stored = load_tokenizer(source).get_vocab(with_added_tokens=True)
    added = {token: i for token, i in tokenizer.get_vocab().items() if token not in stored}
    if added:
        shown = ", ".join(f"{token!r} ({i})" for token, i in sorted(added.items(), key=lambda pair: pair[1])[:4])
        source.notices.add(
            f"{source.folder}: {_TOKENIZER} does not hold {shown}{' and more' if len(added) > 4 else ''}, which other "
            "files name; transformers gives them the next free ids, for which nothing was trained"
        )


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None
