"""What a caller wants an answer to be: JSON of a schema, a text that a regular expression matches, one of some texts,
or a text of a grammar. Checked as far as that needs no library."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mllm_edge.errors import OptionError

__all__ = ["Guide", "guide_of"]

Kind = Literal["schema", "regex", "choices", "grammar"]


@dataclass(frozen=True)
class Guide:
    """One of `VLM.stream`'s options schema, regex, choices and grammar, as text: a schema and choices (a list of
    strings) as JSON."""

    kind: Kind
    text: str


def guide_of(schema: Any, regex: Any, choices: Any, grammar: Any) -> Guide | None:
    """The one that is given, None where none is. Raises OptionError for several, or what cannot be one."""
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise OptionError(f"{' and '.join(names)} are given, an answer follows one", f"leave {names[1]} out")
    (name,) = names
    guide = {
        "schema": lambda: Guide("schema", _schema(schema)),
        "regex": lambda: Guide("regex", _text("regex", regex, "a regular expression")),
        "choices": lambda: Guide("choices", _choices(choices)),
        "grammar": lambda: Guide("grammar", _text("grammar", grammar, "a grammar in Lark's syntax")),
    }[name]()
    try:
        guide.text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} is not valid Unicode: {error}", "replace lone surrogates") from None
    return guide


def _schema(schema: Any) -> str:
    """A schema as JSON text: of a mapping, of text, or of a class of pydantic's kind, which tells its own."""
    tell = getattr(schema, "model_json_schema", None)
    if tell is not None:
        schema = tell()
    try:
        value = json.loads(schema) if isinstance(schema, (str, bytes)) else schema
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"schema is not JSON: {error}", "give a JSON schema as a dict, or its text") from None
    if not isinstance(value, Mapping):
        raise OptionError(f"schema must be a JSON object, not {value!r:.60}", 'such as {"type": "object", …}')
    return text


def _text(name: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{name} must be a string, not {value!r:.60}", f"give {what}")
    return value


def _choices(choices: Any) -> str:
    fix = "give one or more in a list: choices=[…]"
    texts = list(choices) if isinstance(choices, Iterable) and not isinstance(choices, (str, bytes)) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"choices must be a list of strings, not {choices!r:.60}", fix)
    if not texts or not all(texts):
        raise OptionError(f"choices {'has an empty string' if texts else 'is empty'}", fix)
    return json.dumps(texts, ensure_ascii=False)
