"""What the tests need to know of a family: one row, which goes through everything that any family must do."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.families.parity import PROMPTS

__all__ = ["Bad", "Row", "rows"]


@dataclass(frozen=True)
class Bad:
    """A checkpoint that is wrong: `change` edits the content of the JSON `file`; the error of class `error` names
    `word`."""

    word: str
    change: Callable[[dict[str, Any]], Any]
    file: str = "config.json"
    error: str = "ConfigError"


@dataclass(frozen=True)
class Row:
    """`save` (folder, **config) writes a tiny random checkpoint and returns its model in float32; `configs` are what it
    is called with, those with `shard_size` or `shards` in several files; `cases` what is asked: a question and sizes of
    images (height, width). `compared`: the configs whose export is compared with the source in every recipe;
    `probed`: those that are compared by their first layers. `placeholder`: what stands for an image in a text."""

    family: str
    save: Callable[..., Any]
    configs: Mapping[str, Mapping[str, Any]]
    cases: Mapping[str, tuple[str, list[tuple[int, int]]]] = field(default_factory=lambda: PROMPTS)
    compared: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()
    placeholder: str = "<image>"


@cache
def rows() -> Mapping[str, Row]:
    """Every row by its family: each module of `rows/` has one."""
    folder = Path(__file__).with_name("rows")
    names = sorted(info.name for info in pkgutil.iter_modules([str(folder)]))
    found = [importlib.import_module(f"tests.families.rows.{name}").ROW for name in names]
    return {row.family: row for row in found}
