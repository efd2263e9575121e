"""`optimum-cli export mllm-edge`, through Optimum's own entry point."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.cli.export import TARGETS, command
from optimum.commands.register.register_mllm_edge import MllmEdgeExportCommand, _words
from tests.cli.test_main import HEAVY

ENTRY = """
import sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name="optimum-cli")
sys.argv = ["optimum-cli", *sys.argv[1:]]
entry.load()()
"""
Optimum = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def optimum(environment: dict[str, str]) -> Optimum:
    """`optimum("export", …)`: the program in a process of its own."""

    def call(*arguments: Any) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", ENTRY, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, env=environment, text=True)

    return call


def test_optimum_lists_it(optimum: Optimum) -> None:
    done = optimum("export", "--help")
    assert done.returncode == 0, done.stderr
    assert f"mllm-edge {command.short_help}" in " ".join(done.stdout.split())


def test_help_is_that_of_the_verb(optimum: Optimum) -> None:
    done = optimum("export", "mllm-edge", "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in text
            assert parameter.help in text
        else:
            assert parameter.human_readable_name in text
    assert "{" + ",".join(TARGETS) + "}" in text
    assert "[default: int4]" in text
    assert " ".join((command.help or "").split()) in text


def test_a_real_export(optimum: Optimum, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ("--target", "tensorrt", "--target", "cpu", "--recipe", "fp32", "--json")
    done = optimum("export", "mllm-edge", tiny_checkpoint, out, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["recipe"], report["parity"]["greedy_agreement"]) == ("fp32", 1.0)
    variants = Bundle.load(out).manifest.components["decoder"].variants
    assert {variant.target for variant in variants} == {"cpu", "tensorrt"}


def test_errors_are_those_of_the_verb(optimum: Optimum, tiny_bundle: Path, tmp_path: Path) -> None:
    refused = optimum("export", "mllm-edge", tmp_path, tmp_path / "out")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-2].startswith("error: ")
    assert refused.stderr.splitlines()[-1].startswith("  fix: ")
    assert "Traceback" not in refused.stderr
    assert optimum("export", "mllm-edge", "a", "b", "--recipe", "int3").returncode == 2


@pytest.mark.parametrize(
    "words",
    [
        ["model", "out"],
        ["--", "-model", "-out"],
        ["model", "out", "--target", "cpu", "--target", "tensorrt", "--no-fallback", "--force", "--dry-run"],
        ["model", "out", "--recipe", "fp16", "--verify", "off", "--revision=-v1", "--json"],
        ["model", "out", "--revision="],
    ],
)
def test_every_option_arrives_as_it_was_given(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser()
    MllmEdgeExportCommand.parse_args(parser)
    received: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "callback", lambda **values: received.append(values))
    for arguments in (words, _words(parser.parse_args(words))):
        command.main(arguments, standalone_mode=False)
    assert received[0] == received[1]
    assert received[0]["model"] == words[words.index("--") + 1 if "--" in words else 0]


def test_registration_imports_nothing_heavy(environment: dict[str, str]) -> None:
    """Optimum imports it at every start, whatever it is asked for."""
    code = (
        "import sys, optimum.commands.base, optimum.commands.export.base\n"
        "before = set(sys.modules)\nimport optimum.commands.register.register_mllm_edge\n"
        f"print(*[n for n in {HEAVY!r} if n in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True, check=True)
    assert done.stdout.strip() == ""
