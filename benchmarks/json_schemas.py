"""Random JSON schemas that every answer comes to an end under: strings, arrays and numbers have bounds."""

from typing import Any

import numpy as np

__all__ = ["random_schema"]

_NAMES = ("name", "count", "colour", "size", "parts", "is there", "naïve", "a/b", "x", "note", "box", 'the "old" one')
_WORDS = ("red", "blue", "left of it", "none", "", "ünï", "a\nb", "42", "circle", "far away")
_DEPTH = 3


def random_schema(seed: int) -> dict[str, Any]:
    """An object of some properties, alike for one seed."""
    return _object(np.random.default_rng(seed), _DEPTH)


def _any(random: np.random.Generator, depth: int) -> dict[str, Any]:
    kinds = [_enum, _integer, _number, _string, _plain, _union] + [_object, _array] * (depth > 0)
    return kinds[random.integers(len(kinds))](random, depth - 1)


def _object(random: np.random.Generator, depth: int) -> dict[str, Any]:
    names = random.choice(_NAMES, random.integers(1, 5), replace=False).tolist()
    needed = [name for name in names if random.random() < 0.7]
    properties = {name: _any(random, depth) for name in names}
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _array(random: np.random.Generator, depth: int) -> dict[str, Any]:
    least = int(random.integers(0, 3))
    most = least + int(random.integers(0, 3))
    return {"type": "array", "items": _any(random, depth), "minItems": least, "maxItems": most}


def _enum(random: np.random.Generator, _: int) -> dict[str, Any]:
    values = [*random.choice(_WORDS, random.integers(1, 4), replace=False).tolist(), 7, -1.5, None, True]
    return {"enum": values[: random.integers(1, len(values))]}


def _integer(random: np.random.Generator, _: int) -> dict[str, Any]:
    least = int(random.integers(-1000, 1000))
    most = least + int(random.integers(0, 3000))
    exclusive = random.random() < 0.3 and most > least
    return {"type": "integer", "minimum": least, "exclusiveMaximum" if exclusive else "maximum": most}


def _number(random: np.random.Generator, _: int) -> dict[str, Any]:
    """In steps that a float holds exactly: without any the digits need not end. llguidance writes no negative ones."""
    least = int(random.integers(0, 20))
    return {"type": "number", "minimum": least, "maximum": least + int(random.integers(1, 30)), "multipleOf": 0.25}


def _string(random: np.random.Generator, _: int) -> dict[str, Any]:
    if random.random() < 0.25:
        return {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{1,3}$"}
    least = int(random.integers(0, 4))
    return {"type": "string", "minLength": least, "maxLength": least + int(random.integers(0, 12))}


def _plain(random: np.random.Generator, _: int) -> dict[str, Any]:
    return {"type": "boolean" if random.random() < 0.7 else "null"}


def _union(random: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [_integer(random, depth), _string(random, depth)]}
