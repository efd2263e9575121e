"""Ways to call the command line: inside this process, or as a real one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mllm_edge.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli() -> Callable[..., Result]:
    """`cli("run", bundle, "Hi", input=…)`: one command; the result has exit_code, stdout and stderr."""

    def call(*arguments: Any, **options: Any) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="mllm-edge", **options)

    return call


@pytest.fixture
def environment() -> dict[str, str]:
    """Variables for a process that imports this checkout's package."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture
def process(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """`process("run", …)`: the same in a new interpreter."""

    def call(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mllm_edge", *(str(a) for a in arguments)]
        return subprocess.run(command, capture_output=True, env=environment, text=True, **options)

    return call


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG file of 90 × 60 px."""
    path = tmp_path_factory.mktemp("images") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
