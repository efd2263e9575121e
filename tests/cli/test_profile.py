"""`mllm-edge profile` and `mllm-edge profile diff`."""

import csv
import errno
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result

from mllm_edge.cli.profile_report import report
from mllm_edge.runtime.machine.power import Idle, PowerMeter, PowerReading, RailEnergy
from mllm_edge.runtime.profiling import measure
from mllm_edge.runtime.profiling.measure import profile

Cli = Callable[..., Result]
SMALL = ("-n", "5", "--runs", "2", "--warmup", "1", "--iterations", "3", "--threads", "1", "--no-roofline")


def test_table(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("profile", tiny_bundle, *SMALL)
    assert result.exit_code == 0, result.stderr
    for word in ("vision encoder", "prefill", "TTFT", "TPOT", "tok/s", "load", "peak memory", "KV cache", "bundle"):
        assert word in result.stdout
    for word in ("first token", "detokenize", "jitter", "first call", "predicted", "the stages make", "clocks: "):
        assert word in result.stdout
    assert "synthetic, 640 x 480 px, seed 0" in result.stdout
    assert "1 threads" in result.stdout
    assert "p99 100" in result.stdout  # left out: three calls are too few
    assert "2 runs, each with a load of its own: cold call, warm-up calls (1, 1: not seen to settle in run 1, 2)" in (
        result.stdout
    )
    assert "bound 10%" in result.stdout
    assert result.stderr == "profiling\n"


def test_operators_and_power(cli: Cli, tiny_bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "PowerMeter", partial(PowerMeter, period=1e-4))
    result = cli("profile", tiny_bundle, "--ops", "--power", *SMALL)
    assert result.exit_code == 0, result.stderr
    for word in ("GroupQueryAttention", "outside of layers", "longest of each stage"):
        assert word in result.stdout
    # Sensors are read or missed, never passed over.
    assert "J a token" in result.stdout or "hwmon" in result.stdout


def test_what_power_is_of(tiny_bundle: Path) -> None:
    found = profile(tiny_bundle, "Hi", new_tokens=2, runs=1, warmup=0, iterations=1)
    gpu = PowerReading(
        rails={"GPU 0": RailEnergy(50.0, 100.0)},
        total=("GPU 0",),
        scope="GPU alone",
        seconds=2.0,
        samples=20,
        joules_per_token=25.0,
        joules_per_image=50.0,
        joules_per_token_above_idle=5.0,
        joules_per_image_above_idle=10.0,
        idle=Idle(2.0, 21, 40.0, ("over-current oc1",)),
        temperatures={},
        throttled=("over-current oc1", "GPU 0"),
        absent=(),
    )
    shown = report(replace(found, power=gpu))
    assert "25.000 J a token, 50.00 J an image: GPU alone (GPU 0), idle power included" in shown
    assert "5.000 J a token, 10.00 J an image: above the 40.00 W that it drew idle, for 2.0 s" in shown
    assert "the machine throttled: over-current oc1, also at idle; GPU 0" in shown
    unknown = replace(gpu, total=(), scope="", joules_per_token=None, joules_per_token_above_idle=None, throttled=())
    shown = report(replace(found, power=unknown))
    assert "J a token" not in shown
    assert "no throttling" in shown


def test_roofline(cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = cli("profile", tiny_bundle, "-n", "3", "--iterations", "2", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    assert "limits of this processor: reads" in result.stdout
    data = json.loads((tmp_path / "a.json").read_text())
    assert [r["stage"] for r in data["roofline"]] == ["vision_encoder", "connector", "prefill", "decode"]
    decode = data["roofline"][-1]
    assert decode["seconds"] * 2 == data["stages"]["decode"]["median"]
    assert (tmp_path / "mllm-edge" / "limits.json").is_file()


def test_page(cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "page.html"
    assert cli("profile", tiny_bundle, "--html", page, *SMALL).exit_code == 0
    assert "<svg" in page.read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = cli("profile", tmp_path / "no bundle", "--html", page)  # before anything is measured
    assert refused.exit_code == 1
    assert "[report]" in refused.stderr


def test_one_run_tells_nothing_about_noise(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("profile", tiny_bundle, "-n", "1", "--warmup", "0", "--iterations", "1")
    assert "one run tells nothing about noise" in result.stdout
    assert "TPOT" not in result.stdout


def test_json_on_standard_output(cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    result = cli("profile", tiny_bundle, "--image", image_file, "--prompt", "Hi", "--json", *SMALL)
    data = json.loads(result.stdout)
    assert data["setting"]["images"] == str(image_file)
    assert data["setting"]["iterations"] == data["ttft"]["count"] == 3
    assert [len(run["calls"]) for run in data["runs"]] == [2, 1]
    assert data["setting"]["new_tokens"] == 5
    assert data["tpot"]["count"] == 3 * 4
    assert data["ttft"]["percentiles"] == {}
    assert set(data["tpot"]["percentiles"]) == {"p10", "p90"}


def test_files_and_diff(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    a, b, rows, trace = (tmp_path / name for name in ("a.json", "b.json", "a.csv", "a.trace.json"))
    result = cli("profile", tiny_bundle, "--json", a, "--csv", rows, "--trace", trace, *SMALL)
    assert "TTFT" in result.stdout  # the table is printed, too
    assert len(list(csv.DictReader(rows.open()))) > 3
    assert json.loads(trace.read_text())["traceEvents"]
    data = json.loads(a.read_text())
    for figure in (*data["stages"].values(), data["ttft"], data["tpot"], data["total"]):
        figure["spread"] = 0.01
    a.write_text(json.dumps(data))
    data["stages"]["prefill"]["median"] *= 1.5
    data["setting"]["threads"] = 7
    b.write_text(json.dumps(data))
    shown = cli("profile", "diff", a, b)
    assert shown.exit_code == 0
    assert next(line for line in shown.stdout.splitlines() if line.startswith("prefill")).endswith("more")
    assert "different threads: 1 and 7" in shown.stderr
    assert cli("profile", "diff", a, b, "--fail-above", "60%").exit_code == 0
    failed = cli("profile", "diff", a, b, "--fail-above", "10%")
    assert failed.exit_code == 1
    assert "error: grew by more than 10%: prefill (+50.0%)" in failed.stderr
    assert cli("profile", "diff", b, a, "--fail-above", "10").exit_code == 0
    changes = json.loads(cli("profile", "diff", a, b, "--json").stdout)[0]["changes"]
    assert [c["name"] for c in changes if c["beyond_noise"]] == ["prefill"]
    assert cli("profile", "diff", a, b, "--fail-above", "much").exit_code == 2
    assert cli("profile", "diff", a).exit_code == 2
    assert "A B" in cli("profile", "diff", "--help").stdout


def test_a_bundle_called_diff(cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "diff").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    assert "TTFT" in cli("profile", "./diff", *SMALL).stdout


def test_sweep(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    result = cli("profile", tiny_bundle, "--sweep", "new=2,3", "--sweep", "threads=1", "--json", file, *SMALL)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith(("2, 1", "3, 1"))] == ["2, 1", "3, 1"]
    data = json.loads(file.read_text())
    assert data["sweep"] == {"new": [2, 3], "threads": [1]}
    assert [p["setting"]["new_tokens"] for p in data["profiles"]] == [2, 3]


def test_several_bundles(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tiny_bundle)
    data = json.loads(cli("profile", tiny_bundle, tmp_path / "b", "--json", "-", *SMALL).stdout)
    assert [p["point"]["bundle"] for p in data["profiles"]] == [str(tiny_bundle), str(tmp_path / "b")]


def test_speculation(cli: Cli, tiny_bundle: Path, monkeypatch) -> None:
    """Few guesses come true here; what is said of none is tested, too."""
    options = ("--runs", "1", "--warmup", "0", "--iterations", "1", "--threads", "1", "--no-roofline")
    prompt = ("--prompt", "abcabcabcabc " * 3)
    text = cli("profile", tiny_bundle, "--speculation", "4", *prompt, "-n", "40", *options).stdout
    assert re.search(r"speculation  up to 4 tokens: \d+% of the guesses accepted, 1\.\d\d tokens a step; TPOT", text)
    assert "jitter" not in text
    none = cli("profile", tiny_bundle, "--speculation", "4", "-n", "1", *options).stdout
    assert "speculation  up to 4 tokens, none was guessed" in none
    assert "speculation" not in cli("profile", tiny_bundle, "-n", "1", *options).stdout


def test_bad_input(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    assert cli("profile", tiny_bundle, "--iterations", "0").exit_code == 2
    absent = cli("profile", tiny_bundle, "--image", tmp_path / "absent.png")
    assert absent.exit_code == 1
    assert "absent.png" in absent.stderr
    unknown = cli("profile", tiny_bundle, "--sweep", "zzz=1")
    assert unknown.exit_code == 2
    assert "prompt, images, size, new, threads, speculation, bundle" in unknown.stderr
    assert "0 to 15" in cli("profile", tiny_bundle, "--sweep", "speculation=on,off").stderr
    assert cli("profile", tiny_bundle, "--speculation", "16").exit_code == 2
    place = cli("profile", tmp_path / "no bundle", "--csv", tmp_path / "absent" / "a.csv")
    assert "absent does not exist" in place.stderr  # before anything is measured
    assert cli("profile").exit_code == 2


def test_what_was_measured_is_shown_and_kept_when_a_file_cannot_be_written(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, place, other = os.fsync, tmp_path / "p.json", tmp_path / "p.csv"
    place.write_text("precious")
    failed: list[int] = []

    def full_once(handle: int) -> None:
        if not failed:
            failed.append(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("mllm_edge.files.os.fsync", full_once)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    options = ["-n", "2", "--runs", "1", "--warmup", "0", "--iterations", "1", "--no-roofline"]
    result = cli("profile", tiny_bundle, *options, "--json", place, "--csv", other)
    assert result.exit_code == 1
    assert "TTFT" in result.stdout or "ttft" in result.stdout
    assert f"error: {place}: No space left on device" in result.stderr
    kept = re.search(r"it is in (\S+) instead", result.stderr)
    assert kept is not None
    assert json.loads(Path(kept[1]).read_text())["bundle"]
    assert place.read_text() == "precious"
    assert other.read_text().startswith("bundle,run,call,stage")
