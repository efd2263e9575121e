"""What callers hand to a `VLM`, checked: what cannot be used is an OptionError that says what would be."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mllm_edge.errors import OptionError
from mllm_edge.runtime.arrays import in_cuda_memory, on_host
from mllm_edge.runtime.numbers import number, whole
from mllm_edge.runtime.prompt.tokenizer import StopStrings
from mllm_edge.runtime.trace import Trace

__all__ = ["first", "given_trace", "graph_input", "image_sizes_of", "named", "stop_strings", "token_ids"]


def given_trace(trace: Any) -> Trace:
    """The caller's trace, or a new one; raises OptionError for anything else."""
    if trace is not None and not isinstance(trace, Trace):
        raise OptionError(f"trace must be a Trace, not {trace!r:.60}", "pass mllm_edge.runtime.trace.Trace()")
    return trace or Trace()


def named(values: Mapping[str, Any], name: Any, kind: str) -> Any:
    """The value of that name; raises OptionError that lists the names there are."""
    if name not in values:
        raise OptionError(f"no {kind} is named {name!r:.60}", f"there are: {', '.join(values)}")
    return values[name]


def graph_input(name: str, value: Any, dtype: Any) -> Any:
    """A value as a graph takes it: on the host of `dtype`, or in CUDA memory as it is; raises OptionError."""
    if in_cuda_memory(value):
        return value
    try:
        return on_host(value, dtype)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"no array of {dtype} can be made for {name}: {error}", "pass numbers of one shape"
        ) from error


def image_sizes_of(sizes: Any) -> list[tuple[float, ...]]:
    """(height, width) in px of each image, (frames, height, width) of a video, perhaps with its frames a second; raises
    OptionError."""
    if not isinstance(sizes, Iterable):
        raise OptionError(f"image_sizes must be a list, not {sizes!r:.60}", "give one (height, width) per image")
    return [_size(size) for size in sizes]


def _size(size: Any) -> tuple[float, ...]:
    values = tuple(size) if isinstance(size, Iterable) else ()
    if len(values) == 4:
        return (*_size(values[:3]), number("the frames a second of a video size", values[3], 0, above=True))
    if len(values) not in (2, 3):
        raise OptionError(f"an image size is (height, width), not {size!r:.60}", "give two numbers of px")
    names = ("the frames of a video size", "the height of an image size", "the width of an image size")
    return tuple(whole(name, value, 1) for name, value in zip(names[-len(values) :], values, strict=True))


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def stop_strings(stop: Any) -> StopStrings:
    """One stop string or several; raises OptionError."""
    try:
        return StopStrings([stop] if isinstance(stop, str) else stop)
    except (TypeError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"stop: {stop!r:.60} is no list of strings"
        raise OptionError(what, "give stop as a string, or several in a list") from error


def token_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    """One token id or several, none for None; raises OptionError."""
    if ids is None:
        return []
    if isinstance(ids, str) or not isinstance(ids, (int, np.integer, Iterable)):
        raise OptionError(f"{name} must be a list of token ids, not {ids!r:.60}", f"give {name} as whole numbers")
    return [whole(name, i, 0, vocab_size - 1) for i in (ids if isinstance(ids, Iterable) else [ids])]
