"""Ctrl-C ends every command with 130, also while something is imported, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_edge.cli.signals import Interrupted, was_interrupted

# Sends SIGINT when a module is imported, as a user may; `swallow` has the import make another error of it.
HOOK = """
import os, signal, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException as e:
                if "SWALLOW" in os.environ:
                    raise ImportError("cannot be imported") from e
                raise
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Hook())
"""
RUN = ("run", "BUNDLE", "Hi", "--max-new-tokens", "1")
CASES = [
    (RUN, "click"),
    (RUN, "mllm_edge.cli"),
    (RUN, "mllm_edge.cli.run"),
    (RUN, "mllm_edge.runtime.vlm"),
    (RUN, "numpy"),
    (RUN, "xxhash"),
    (RUN, "tokenizers"),
    (RUN, "onnxruntime"),
    (("chat", "BUNDLE"), "onnxruntime"),
    (("inspect", "BUNDLE"), "mllm_edge.bundle"),
    (("profile", "BUNDLE"), "onnxruntime"),
    (("compare", "BUNDLE", "BUNDLE"), "mllm_edge.compare.compare"),
    (("compare", "BUNDLE", "CHECKPOINT"), "transformers"),
    (("build", "BUNDLE"), "mllm_edge.runtime.build"),
    (("doctor",), "mllm_edge.runtime.doctor"),
    (("families",), "mllm_edge.cli.families"),
    (("completion", "bash"), "click.shell_completion"),
    (("--help",), "mllm_edge.cli.output"),
    (("export", "CHECKPOINT", "OUT"), "mllm_edge.export.early"),
    (("export", "CHECKPOINT", "OUT"), "torch"),
    (("export", "CHECKPOINT", "OUT"), "transformers"),
    (("export", "CHECKPOINT", "OUT"), "onnx_ir"),
    (("quantize", "BUNDLE", "OUT", "--data", "IMAGES"), "mllm_edge.export.quantize"),
    (("quantize", "BUNDLE", "OUT", "--data", "IMAGES"), "PIL"),
]


def interrupted(
    arguments: tuple[str, ...], module: str, folder: Path, names: dict[str, Path], environment: dict[str, str]
) -> subprocess.CompletedProcess:
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    paths = os.pathsep.join([str(folder / "hook"), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "mllm_edge", *(str(names.get(a, a)) for a in arguments)]
    variables = {**environment, "PYTHONPATH": paths, "INTERRUPT_AT": module}
    return subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def names(tiny_bundle: Path, tiny_checkpoint: Path, image_file: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "BUNDLE": tiny_bundle,
        "CHECKPOINT": tiny_checkpoint,
        "IMAGES": image_file.parent,
        "OUT": tmp_path / "out" / "bundle",
    }


@pytest.mark.parametrize(("arguments", "module"), CASES, ids=[f"{a[0]}-{module}" for a, module in CASES])
def test_while_something_is_imported(
    arguments: tuple[str, ...], module: str, names: dict[str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    done = interrupted(arguments, module, tmp_path, names, environment)
    assert done.returncode == 130, done.stderr
    assert "interrupted: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hook"]


@pytest.mark.parametrize("module", ["onnxruntime", "tokenizers"])
def test_an_import_that_makes_another_error_of_it(
    module: str, names: dict[str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    done = interrupted(RUN, module, tmp_path, names, {**environment, "SWALLOW": "1"})
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


def test_completion_in_a_shell(names: dict[str, Path], tmp_path: Path, environment: dict[str, str]) -> None:
    shell = {"_MLLM_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": "mllm-edge ex", "COMP_CWORD": "1"}
    done = interrupted((), "click.shell_completion", tmp_path, names, {**environment, **shell})
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


def test_what_came_of_an_interruption() -> None:
    def raised(first: BaseException, explicit: bool) -> Exception:
        try:
            try:
                raise first
            except BaseException as e:
                if explicit:
                    raise ImportError("no") from e
                raise RuntimeError("no")  # noqa: B904
        except Exception as e:
            return e

    for explicit in (True, False):
        assert was_interrupted(raised(KeyboardInterrupt(), explicit))
        assert was_interrupted(raised(Interrupted(2, "stopped"), explicit))
        assert not was_interrupted(raised(ValueError(), explicit))
    error = ValueError()
    error.__context__ = other = ValueError()
    other.__context__ = error
    assert not was_interrupted(error)
