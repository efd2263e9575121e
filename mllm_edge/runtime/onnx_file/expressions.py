"""Dimensions that a graph tells as a formula of others, such as "4*cells"."""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

__all__ = ["dimension"]

_BINARY: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CHOICES: Mapping[str, Callable[..., int]] = {"Max": max, "Min": min}
_LONGEST = 200  # characters of a formula


def dimension(told: int | str, sizes: Mapping[str, int]) -> int | None:
    """The number; None where the formula is of an unknown kind, or has a name that `sizes` does not."""
    if isinstance(told, int) or told in sizes:
        return told if isinstance(told, int) else sizes[told]
    tree = _parsed(told)
    try:
        return None if tree is None else _value(tree, sizes)
    except (KeyError, ZeroDivisionError):
        return None


@lru_cache(256)
def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body if 0 < len(text) <= _LONGEST else None
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    """Raises KeyError for what is not known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        return _CHOICES[node.func.id](*(_value(part, sizes) for part in node.args))
    raise KeyError(type(node).__name__)
