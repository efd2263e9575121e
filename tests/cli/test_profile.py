"""`mllm-edge profile`."""

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Cli = Callable[..., Result]
SMALL = ("-n", "5", "--warmup", "1", "--iterations", "3", "--threads", "1")


def test_table(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("profile", tiny_bundle, *SMALL)
    assert result.exit_code == 0, result.stderr
    for word in ("vision encoder", "prefill", "TTFT", "TPOT", "tok/s", "load", "peak memory", "KV cache", "bundle"):
        assert word in result.stdout
    assert "synthetic, 640 x 480 px, seed 0" in result.stdout
    assert "1 threads" in result.stdout
    assert "p99 100" in result.stdout  # left out: three calls are too few
    assert result.stderr == "profiling\n"


def test_json(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    result = cli("profile", tiny_bundle, "--image", image_file, "--prompt", "Hi", "--json", *SMALL)
    data = json.loads(result.stdout)
    assert data["image"] == str(image_file)
    assert data["iterations"] == data["stages"]["ttft"]["count"] == 3
    assert data["new_tokens"] == 5
    assert data["tpot"]["count"] == 3 * 4
    assert data["stages"]["ttft"]["percentiles"] == {}
    assert set(data["tpot"]["percentiles"]) == {"p10", "p90"}


def test_bad_input(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    assert cli("profile", tiny_bundle, "--iterations", "0").exit_code == 2
    absent = cli("profile", tiny_bundle, "--image", tmp_path / "absent.png")
    assert absent.exit_code == 1
    assert "absent.png" in absent.stderr
