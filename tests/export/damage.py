"""What the tests of wrong checkpoints do to a file, and what an export of it must come to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mllm_edge.errors import MllmEdgeError
from mllm_edge.export.pipeline import export

__all__ = ["assert_fails", "edit_json", "edit_weights"]


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(checkpoint: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")


def assert_fails(checkpoint: Path | str, kind: type[MllmEdgeError], *words: str, **options: Any) -> None:
    """The export fails with an error that holds all `words`, and leaves no file behind."""
    parent = Path(checkpoint).parent if isinstance(checkpoint, Path) else Path.cwd()
    before = sorted(parent.iterdir())
    with pytest.raises(kind) as caught:
        export(str(checkpoint), parent / "out", **{"recipe_name": "fp32", "verify_mode": "off", **options})
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    assert sorted(parent.iterdir()) == before
