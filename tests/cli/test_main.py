"""The group: overview, versions, errors, and what it does not import."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mllm_edge import __version__
from mllm_edge.cli import VERBS

Cli = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess]
HEAVY = ("jinja2", "mllm_edge.bundle", "numpy", "onnx", "onnxruntime", "PIL", "tokenizers", "torch", "transformers")


def test_overview_lists_every_verb_with_its_own_summary(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    for name, summary in VERBS.items():
        command = importlib.import_module(f"mllm_edge.cli.{name}").command
        assert command.name == name
        assert command.short_help == summary
        assert any(line.split(maxsplit=1) == [name, summary] for line in result.stdout.splitlines())


def test_every_module_of_a_verb_is_listed() -> None:
    folder = Path(importlib.import_module("mllm_edge.cli").__file__ or "").parent
    helpers = {
        "__init__",
        "doctor_checkpoint",
        "exporter",
        "guiding",
        "inspect_plan",
        "options",
        "output",
        "progress",
        "signals",
        "proof",
        "profile_diff",
        "profile_report",
    }
    assert {path.stem for path in folder.glob("*.py")} - helpers == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_kebab_case_and_explained(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.exit_code == 0
    command = importlib.import_module(f"mllm_edge.cli.{verb}").command
    for parameter in command.params:
        for flag in parameter.opts:
            assert "_" not in flag or parameter.param_type_name == "argument"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(environment: dict[str, str], arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print(*[n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))\n"
        f"from mllm_edge.cli import main; main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True, check=True)
    assert done.stdout
    assert done.stderr.strip() == ""


def test_overview_imports_no_verb(environment: dict[str, str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print(*[v for v in {list(VERBS)!r} if 'mllm_edge.cli.' + v in sys.modules]))\n"
        "from mllm_edge.cli import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"mllm-edge, version {__version__}\n"


def test_unknown_verb_names_the_nearest(cli: Cli) -> None:
    result = cli("exprot", "a", "b")
    assert result.exit_code == 2
    assert "did you mean 'export'?" in result.stderr
    assert ", ".join(VERBS) in cli("zzz").stderr


@pytest.mark.parametrize(("verb", "wrong", "right"), [("run", "--imgae", "--image"), ("export", "--recip", "--recipe")])
def test_unknown_option_names_the_nearest(cli: Cli, verb: str, wrong: str, right: str) -> None:
    result = cli(verb, "a", "b", wrong, "c")
    assert result.exit_code == 2
    assert "Did you mean" in result.stderr
    assert right in result.stderr


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"chat", "completion"}))
def test_every_verb_that_reports_does_so_in_json_too(verb: str) -> None:
    command = importlib.import_module(f"mllm_edge.cli.{verb}").command
    flags = {flag: parameter for parameter in command.params for flag in parameter.opts}
    assert flags["--json"].is_flag or flags["--json"].flag_value == "-"  # a file may be named


def test_an_error_is_two_lines_without_a_traceback(process: Process, tmp_path: Path) -> None:
    done = process("inspect", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert "nowhere" in first
    assert second.startswith("  fix: mllm-edge export")


@pytest.mark.parametrize("by_option", [True, False])
def test_debug_shows_the_traceback(process: Process, tmp_path: Path, by_option: bool, monkeypatch) -> None:
    if not by_option:
        monkeypatch.setenv("MLLM_EDGE_DEBUG", "1")
    flags = ["--debug"] if by_option else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "mllm_edge", *flags, "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "BundleError" in done.stderr


def test_system_errors_are_told_in_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").symlink_to(tmp_path / "manifest.json")  # a loop: cannot be opened
    result = cli("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_console_script_is_declared() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'mllm-edge = "mllm_edge.cli:main"' in text
