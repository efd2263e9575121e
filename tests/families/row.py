"""What the tests need to know of a family: one row, which goes through everything that any family must do."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.export.targets import TARGETS
from tests.families.parity import PROMPTS

__all__ = ["MECHANISMS", "Bad", "Row", "Tensor", "families_of", "rows", "sets"]

MECHANISMS = ("calibration", "eight_bits", "int8_cache", "segments", "speculation")


@dataclass(frozen=True)
class Bad:
    """A checkpoint that is wrong: `change` edits the content of `file`, JSON or, in `model.safetensors`, arrays by
    name; None: the file is missing. The error of class `error` names `word` and what stands in `also`. `config`: which
    of the row's configs is damaged, if not its first."""

    word: str
    change: Callable[[dict[str, Any]], Any] | None
    file: str = "config.json"
    error: str = "ConfigError"
    config: str = ""
    also: tuple[str, ...] = ()


def sets(section: str = "", /, **values: Any) -> Callable[[dict[str, Any]], None]:
    """The change that gives keys of a file, or of a section of it, these values."""
    return lambda content: (content[section] if section else content).update(values)


@dataclass(frozen=True)
class Tensor:
    """A tensor by its name in the files of a config, the row's first if none is told. `told`: what an error calls it,
    if not so."""

    name: str
    config: str = ""
    told: str = ""


@dataclass(frozen=True)
class Row:
    """`save` (folder, **config) writes a tiny random checkpoint and returns its model in float32; `configs` are what it
    is called with, those with `shard_size` or `shards` in several files; `cases` what is asked: a question and sizes of
    images (height, width). `compared`: the configs whose export is compared with the source in every recipe;
    `probed`: those that are compared by their first layers; `layouts`: one for each kind of files, and `targets`: those
    that are exported for every target; the first, if none is told.

    `rewindable`: whether tokens can be forgotten again, which speculation needs. `refused`: targets that there is no
    form for, and what the error says. `spared`: the `MECHANISMS` whose long
    tests the family does not go through, and why: what another family shows as well, or where else it is shown.

    Of wrong checkpoints: `bad`; `needed`, without which an export fails; `unneeded`, which it does not drop silently;
    `tokens` that the tokenizer must have, beside the `placeholder`, which stands for an image in a text."""

    family: str
    save: Callable[..., Any]
    configs: Mapping[str, Mapping[str, Any]]
    cases: Mapping[str, tuple[str, list[tuple[int, int]]]] = field(default_factory=lambda: PROMPTS)
    compared: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    rewindable: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    spared: Mapping[str, str] = field(default_factory=dict)
    bad: tuple[Bad, ...] = ()
    needed: tuple[Tensor, ...] = ()
    unneeded: tuple[Tensor, ...] = ()
    tokens: tuple[str, ...] = ()
    placeholder: str = "<image>"

    def __post_init__(self) -> None:
        assert set(self.spared) <= set(MECHANISMS)
        assert all(self.spared.values())

    @property
    def reached(self) -> tuple[str, ...]:
        """The targets that there is a form for."""
        return tuple(target for target in TARGETS if target not in self.refused)

    @property
    def for_targets(self) -> tuple[str, ...]:
        """The configs that are exported for every target."""
        return self.targets or (self.first,)

    @property
    def first(self) -> str:
        """The first config."""
        return next(iter(self.configs))


@cache
def rows() -> Mapping[str, Row]:
    """Every row by its family: each module of `rows/` has one."""
    folder = Path(__file__).with_name("rows")
    names = sorted(info.name for info in pkgutil.iter_modules([str(folder)]))
    found = [importlib.import_module(f"tests.families.rows.{name}").ROW for name in names]
    return {row.family: row for row in found}


def families_of(mechanism: str, target: str = "cpu") -> list[Any]:
    """Parameters: the families that go through the tests of a mechanism, or of "" all, and have a form for the target.
    Those of a family go to one process, where they share its checkpoint, its traces and its bundles."""
    assert mechanism in ("", *MECHANISMS)
    going = (family for family, row in rows().items() if mechanism not in row.spared and target in row.reached)
    return [pytest.param(family, marks=pytest.mark.xdist_group(f"bundle-{family}")) for family in going]
