"""Which part of a JSON schema it is that cannot be taken: llguidance's errors do not say where they are."""

import json
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["failing_part", "parts_of"]

_DEFINITIONS = ("$defs", "definitions")
_OF_NAMES = ("properties", "patternProperties", *_DEFINITIONS)
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_OF_ONE = ("items", "additionalProperties", "additionalItems")


def failing_part(schema: dict[str, Any], message: str, error_of: Callable[[str], str]) -> tuple[str, str]:
    """The smallest part of a schema that is refused by itself, as a JSON pointer (RFC 6901), and why; of several, one
    that is refused for what the whole is. `message`: of the whole; `error_of`: what is said against a schema's text,
    empty where that is nothing."""
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    place, part, seen = "#", schema, {"#"}
    while True:
        parts = [(f"{place}/{name}", inner) for name, inner in _parts(part)] + _referred(schema, part)
        refused = []
        for name, inner in parts:
            why = "" if name in seen else error_of(json.dumps({**shared, **inner}))
            if why:
                refused.append((why != message, name, inner, why))
        if not refused:
            return place, message
        _, place, part, message = min(refused, key=lambda one: one[0])
        seen.add(place)


def parts_of(schema: dict[str, Any], place: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all that are in it, as JSON pointers and what stands there."""
    yield place, schema
    for name, part in _parts(schema):
        yield from parts_of(part, f"{place}/{name}")


def _referred(schema: dict[str, Any], part: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The definition that a part refers to, and where it stands."""
    place = part.get("$ref")
    for key in _DEFINITIONS:
        names = schema.get(key)
        for name, definition in names.items() if isinstance(names, dict) else ():
            if place == f"#/{key}/{_escaped(str(name))}" and isinstance(definition, dict):
                return [(place, definition)]
    return []


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, with their places."""
    found: list[tuple[str, Any]] = []
    for key in _OF_NAMES:
        value = schema.get(key)
        names = value.items() if isinstance(value, dict) else ()
        found += [(f"{key}/{_escaped(str(name))}", part) for name, part in names]
    for key in _OF_LISTS:
        value = schema.get(key)
        found += [(f"{key}/{i}", part) for i, part in enumerate(value if isinstance(value, list) else ())]
    found += [(key, schema.get(key)) for key in _OF_ONE]
    yield from ((name, part) for name, part in found if isinstance(part, dict))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
