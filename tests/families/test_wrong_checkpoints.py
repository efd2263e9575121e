"""Checkpoints of every family that contradict themselves, lack something or hold more than anybody handles: each error
names what and where, and nothing is left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge import errors
from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.pipeline import export
from tests.export.damage import assert_fails, edit_json, edit_weights
from tests.families.row import Bad, Row, Tensor, rows

ROWS = rows()
Copy = Callable[[str, str], Path]


@pytest.fixture
def copy(saved: Callable[..., Path], tmp_path: Path) -> Copy:
    """A copy of a family's config that a test may damage."""
    return lambda family, config: Path(shutil.copytree(saved(family, config), tmp_path / "checkpoint"))


def each(told: Callable[[Row], list[tuple[str, Any]]]) -> list[Any]:
    """A parameter (family, what a row tells) for each of the latter, with its name; those of a family go to one
    process."""
    return [
        pytest.param(family, value, id=f"{family}-{name}", marks=pytest.mark.xdist_group(f"bundle-{family}"))
        for family, row in ROWS.items()
        for name, value in told(row)
    ]


def configs(row: Row) -> list[tuple[str, str]]:
    """Those that are damaged."""
    found = [*(row.layouts or (row.first,)), *(wrong.config for wrong in (*row.bad, *row.needed, *row.unneeded))]
    return [(config, config) for config in dict.fromkeys(found) if config]


def tensors(of: str) -> Callable[[Row], list[tuple[str, Tensor]]]:
    return lambda row: [(f"{tensor.config}-{tensor.name}".strip("-"), tensor) for tensor in getattr(row, of)]


def tokens(row: Row) -> list[tuple[str, Any]]:
    """In each kind of files."""
    kinds, needed = row.layouts or (row.first,), (row.placeholder, *row.tokens)
    return [(f"{config}-{token}", (config, token)) for config in kinds for token in needed]


@pytest.mark.parametrize(("family", "config"), each(configs))
def test_undamaged_checkpoint_is_accepted(copy: Copy, tmp_path: Path, family: str, config: str) -> None:
    assert export(str(copy(family, config)), tmp_path / "out", dry_run=True).nbytes > 0


@pytest.mark.parametrize(("family", "bad"), each(lambda row: [(bad.word, bad) for bad in row.bad]))
def test_files(copy: Copy, family: str, bad: Bad) -> None:
    checkpoint = copy(family, bad.config)
    if bad.change is None:
        (checkpoint / bad.file).unlink()
    elif bad.file == "model.safetensors":
        edit_weights(checkpoint, bad.change)
    else:
        edit_json(checkpoint / bad.file, bad.change)
    assert_fails(checkpoint, getattr(errors, bad.error), bad.word, *bad.also)


@pytest.mark.parametrize(("family", "token"), each(tokens))
def test_special_token_missing_from_the_vocabulary(copy: Copy, family: str, token: tuple[str, str]) -> None:
    checkpoint, name = copy(family, token[0]), token[1]
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"{name}"', '"<other>"'))
    assert_fails(checkpoint, ConfigError, "tokenizer.json", f"special token {name} is missing")


@pytest.mark.parametrize(("family", "tensor"), each(tensors("needed")))
def test_missing_weight(copy: Copy, family: str, tensor: Tensor) -> None:
    """Named as the files would, where another layer tells how; else by transformers' name."""
    checkpoint = copy(family, tensor.config)
    edit_weights(checkpoint, lambda weights: weights.pop(tensor.name))
    assert_fails(checkpoint, WeightsError, tensor.told or tensor.name)


@pytest.mark.parametrize(("family", "tensor"), each(tensors("unneeded")))
def test_unused_weight(copy: Copy, family: str, tensor: Tensor) -> None:
    checkpoint = copy(family, tensor.config)
    edit_weights(checkpoint, lambda weights: weights.update({tensor.name: np.zeros((1, 64), np.float32)}))
    assert_fails(checkpoint, WeightsError, tensor.told or tensor.name, "drop it silently")


@pytest.mark.parametrize("family", ROWS)
def test_every_row_has_all_kinds_of_damage(family: str) -> None:
    row = ROWS[family]
    assert row.bad
    assert row.needed
    assert row.unneeded
    assert {bad.error for bad in row.bad} >= {"ConfigError", "WeightsError"}
