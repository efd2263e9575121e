"""`mllm-edge completion`: the script, and what the shell gets when it asks."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result

from tests.cli.test_main import HEAVY

Cli = Callable[..., Result]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script(cli: Cli, shell: str) -> None:
    result = cli("completion", shell)
    assert result.exit_code == 0
    assert f"_MLLM_EDGE_COMPLETE={shell}_complete" in result.stdout
    assert "mllm-edge" in result.stdout


def test_the_help_names_the_line_for_the_start_file(cli: Cli) -> None:
    assert 'eval "$(mllm-edge completion bash)"' in cli("completion", "--help").stdout


def test_unknown_shell(cli: Cli) -> None:
    assert cli("completion", "powershell").exit_code == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mllm-edge ex", {"plain,export"}),
        ("mllm-edge run --temp", {"plain,--temperature"}),
        ("mllm-edge export --recipe int", {"plain,int8", "plain,int4"}),
    ],
)
def test_completes_without_heavy_modules(environment: dict[str, str], words: str, expected: set[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print(*[n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))\n"
        "from mllm_edge.cli import main; main(prog_name='mllm-edge')"
    )
    variables = {
        "_MLLM_EDGE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, env={**environment, **variables}, text=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr.strip() == ""
