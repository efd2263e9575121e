"""Numbers that a caller gives: their type and range, refused alike everywhere."""

from typing import Any

import numpy as np

from mllm_edge.errors import OptionError

__all__ = ["LARGEST", "number", "whole"]

# Beyond it float32, in which logits are, knows only infinity.
LARGEST = 1e30


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, when it is a whole number from `least` to `most`; numpy's integers are, True and 2.0 are not.

    Raises OptionError, which tells `name`, the value and the range.
    """
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        to = "on" if most is None else f"to {most}"
        raise _refused(name, value, f"a whole number from {least} {to}")
    return int(value)


def number(name: str, value: Any, least: float, most: float = LARGEST, *, above: bool = False) -> float:
    """`value` as a float, when it is a number from `least` (or `above` it) to `most`; NaN is none.

    Raises OptionError as `whole` does.
    """
    fits = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # numpy's own would be compared in their few bits.
    given = value.item() if isinstance(value, np.generic) else value
    if not fits or not least <= given <= most or (above and given == least):
        raise _refused(name, value, f"a number {f'above {least:g}' if above else f'from {least:g}'} to {most:g}")
    return float(given)


def _refused(name: str, value: Any, rule: str) -> OptionError:
    return OptionError(f"{name} must be {rule}, not {value!r:.60}", f"give {name} as {rule}")
