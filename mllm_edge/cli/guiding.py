"""Options that say what an answer must be, by the names that `VLM.stream` has for them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["guide_of", "guide_options"]

_F = TypeVar("_F", bound=Callable[..., Any])
_GUIDES = {"schema": "--schema", "regex": "--regex", "choices": "--one-of", "grammar": "--grammar"}


def guide_options(command: _F) -> _F:
    """What guides an answer, where it ends by a token, and how long the model thinks before it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def guide_of(options: Mapping[str, Any], scored: Sequence[str] = ()) -> str:
    """The option that guides the answer; empty where there is none. Raises UsageError for two, and for one where
    choices are `scored`."""
    given = [flag for name, flag in _GUIDES.items() if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other: an answer follows one")
    if given and scored:
        raise click.UsageError(f"{given[0]} and --choices exclude each other: with --choices no answer is made")
    return given[0] if given else ""


def _schema(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value if value is None or value.lstrip().startswith("{") else _content(context, parameter, value)


def _content(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as e:
        raise click.BadParameter(f"{value}: cannot be read ({e.strerror or e})", context, parameter) from None
    except ValueError as e:  # not UTF-8, or a name with a null character
        raise click.BadParameter(f"{value!r:.60}: not a text file ({e})", context, parameter) from None


def _several(context: click.Context, parameter: click.Parameter, value: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return value or None


_OPTIONS = (
    click.option(
        "--schema",
        callback=_schema,
        metavar="FILE_OR_JSON",
        help="The answer is JSON that this JSON schema allows.",
    ),
    click.option(
        "--regex", metavar="TEXT", help="The answer is a text that this regular expression matches as a whole."
    ),
    click.option(
        "--one-of",
        "choices",
        multiple=True,
        callback=_several,
        metavar="TEXT",
        help="The answer is this text, or another one that is given so; repeatable.",
    ),
    click.option(
        "--grammar", callback=_content, metavar="FILE", help="The answer is a text of this grammar, in Lark's syntax."
    ),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=click.IntRange(min=0),
        multiple=True,
        callback=_several,
        metavar="ID",
        help="End the answer at this token, too; repeatable.",
    ),
    click.option(
        "--max-thinking-tokens",
        type=click.IntRange(min=0),
        help="End the model's thinking part behind so many tokens.",
    ),
    click.option("--thinking-end", metavar="TOKEN", help="The token that ends it, where it is not one like </think>."),
)
