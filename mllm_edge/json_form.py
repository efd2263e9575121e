"""Frozen dataclasses as JSON and back, by the types of their fields."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mllm_edge.errors import BundleError

__all__ = ["from_json", "to_json"]

_DEEPEST = 50
_DAMAGED = "the bundle is damaged or newer than this mllm-edge: export it again, or upgrade mllm-edge"


def to_json(value: Any) -> Any:
    """A dataclass (or a container of them) as plain dicts, lists and scalars, defaults included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def from_json(kind: Any, data: Any, where: str = "manifest") -> Any:
    """The inverse of `to_json` for the annotated type `kind`.

    Raises BundleError that names the place (`where`) when a field is missing, unknown or of the wrong type.
    """
    origin = typing.get_origin(kind)
    if kind is Any:
        return _plain(data, where)
    if origin in (typing.Union, types.UnionType):
        return _union_from_json(kind, data, where)
    if origin is Literal:
        return _require(isinstance(data, str) and data in typing.get_args(kind), data, kind, where)
    if origin is tuple:
        _require(isinstance(data, list), data, kind, where)
        item = typing.get_args(kind)[0]
        return tuple(from_json(item, v, f"{where}[{i}]") for i, v in enumerate(data))
    if origin in (dict, Mapping):
        _require(isinstance(data, dict), data, kind, where)
        item = typing.get_args(kind)[1]
        return {k: from_json(item, v, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, data, where)
    if kind is float and type(data) in (int, float):
        return float(_require(abs(data) <= sys.float_info.max, data, kind, where))
    return _require(type(data) is kind, data, kind, where)


def _plain(data: Any, where: str) -> Any:
    """What has no type of its own, as far as it is nested at all sensibly."""
    level = [data]
    for _ in range(_DEEPEST):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for values in inner for v in values]
        if not level:
            return data
    raise BundleError(f"{where}: nested deeper than {_DEEPEST} levels", _DAMAGED)


def _require(ok: bool, data: Any, kind: Any, where: str) -> Any:
    if not ok:
        name = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
        raise BundleError(
            f"{where}: {data!r:.80} is not {name}",
            _DAMAGED,
        )
    return data


def _union_from_json(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None:
        return _require(type(None) in options, data, kind, where)
    tagged = [o for o in options if dataclasses.is_dataclass(o)]
    if len(tagged) > 1:
        op = data.get("op") if isinstance(data, dict) else None
        match = [o for o in tagged if any(f.name == "op" and f.default == op for f in dataclasses.fields(o))]
        _require(len(match) == 1, op if op is not None else data, "a transform this version knows", where)
        return from_json(match[0], data, where)
    present = [o for o in options if o is not type(None)]
    for option in present[:-1]:
        try:
            return from_json(option, data, where)
        except BundleError:
            continue
    return from_json(present[-1], data, where)


def _dataclass_from_json(kind: Any, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), data, kind, where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        what = f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}"
        raise BundleError(
            f"{where}: {what} in {kind.__name__}",
            _DAMAGED,
        )
    return kind(**{k: from_json(hints[k], v, f"{where}.{k}") for k, v in data.items()})
