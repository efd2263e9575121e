"""`mllm-edge export`: reports, refusals, and what an interruption leaves behind (nothing)."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.cli import export as verb
from mllm_edge.cli.signals import Interrupted, interruptible
from mllm_edge.export import pipeline
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Family
from mllm_edge.export.pipeline import TARGETS

Cli = Callable[..., Result]

# The export stops for good at a certain step, in the main thread, until a signal comes.
PAUSED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from mllm_edge.export import export_job
def pause(*args):
    print("paused", file=sys.stderr, flush=True)
    while True:
        signal.pause()
export_job.{step} = pause
from mllm_edge.cli import main
main(sys.argv[1:])
"""


def test_choices_are_those_of_the_exporter() -> None:
    assert tuple(RECIPES) == verb.RECIPES
    assert tuple(TARGETS) == verb.TARGETS


def test_report(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = cli("export", tiny_checkpoint, out, "--recipe", "int8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    stages = ["reading the checkpoint", "writing vision_encoder", "writing decoder", "comparing with the source model"]
    proven = "comparing the graphs in float32 with the source model"
    stages = [*stages[:3], proven, "writing decoder as fp32, for a while", stages[3]]
    assert [line for line in result.stderr.splitlines() if line in stages] == stages
    for word in ("vision_encoder", "connector", "decoder", "embed_tokens", "total", "error", "limit", "greedy tokens"):
        assert word in result.stderr
    assert f'next: mllm-edge run {out} "What is in the picture?" --image FILE' in result.stderr
    assert Bundle.load(out).manifest.recipe["name"] == "int8"


def test_json(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = cli("export", tiny_checkpoint, out, "--recipe", "fp32", "--verify", "off", "--json")
    report = json.loads(result.stdout)
    assert report["out"] == str(out)
    assert report["recipe"] == "fp32"
    assert report["parity"] == {}
    assert report["nbytes"] == Bundle.load(out).nbytes
    assert report["seconds"] > 0
    assert "bundle" not in result.stderr


def test_notices_of_the_reading_are_told_once_and_kept(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a.json and b.json differ in x: a.json's is taken"
    family_for = pipeline.family_for

    def reader(source: Source) -> Family:
        source.notices.add(text)
        source.notices.add(text)
        return family_for(source)

    monkeypatch.setattr(pipeline, "family_for", reader)
    out = tmp_path / "bundle"
    result = cli("export", tiny_checkpoint, out, "--recipe", "fp32", "--verify", "off", "--json")
    assert result.stderr.splitlines().count(f"note: {text}") == 1
    assert json.loads(result.stdout)["notices"] == [text]
    assert Bundle.load(out).manifest.provenance["notices"] == [text]
    assert f"note: {text}" in cli("inspect", out).stdout


def test_dry_run_writes_nothing(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = cli("export", tiny_checkpoint, out, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stderr
    assert "int4" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_out_exists(cli: Cli, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    before = _contents(tiny_bundle)
    result = cli("export", tiny_checkpoint, tiny_bundle)
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert _contents(tiny_bundle) == before


def test_unknown_model(cli: Cli, tmp_path: Path) -> None:
    result = cli("export", tmp_path / "nowhere", tmp_path / "out")
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert "  fix: " in result.stderr


@pytest.mark.parametrize("option", [["--recipe", "int5"], ["--target", "moon"], ["--verify", "maybe"]])
def test_unknown_choices_are_usage_errors(cli: Cli, tmp_path: Path, option: list[str]) -> None:
    result = cli("export", "model", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_without_the_export_extra(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None):
        return None if name in ("torch", "onnx_ir") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = cli("export", "model", tmp_path / "out")
    assert result.exit_code == 1
    assert "onnx_ir, torch" in result.stderr
    assert "pip install" in result.stderr
    assert "[export]" in result.stderr


# The steps: while the first component's files are half written, and when everything is written but not in place.
@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, "save_model"), (signal.SIGTERM, "verify")])
def test_an_interruption_leaves_nothing_behind(
    environment: dict[str, str], tiny_checkpoint: Path, tmp_path: Path, number: signal.Signals, step: str
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text("the old bundle", encoding="utf-8")
    code = PAUSED.format(step=step)
    command = [sys.executable, "-c", code, "export", str(tiny_checkpoint), str(out), "--force"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        lines = list(_until_paused(running.stderr))
        assert lines[-1] == "paused"
        assert len(list(tmp_path.iterdir())) == 3  # the old bundle, the workspace and the lock
        running.send_signal(number)
        rest = running.stderr.read()
    assert running.returncode == 128 + number
    assert rest == "interrupted: the export was stopped; its temporary files are gone\n"
    assert _contents(tmp_path) == {"bundle/manifest.json": b"the old bundle"}


def test_a_swallowed_interruption_comes_back() -> None:
    def work() -> None:
        with interruptible("stopped") as check:
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                signal.raise_signal(signal.SIGTERM)  # a second one does not disturb the clean-up
            check()

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _until_paused(stream) -> Iterator[str]:
    for line in stream:
        yield line.strip()
        if line == "paused\n":
            return


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_adapters_are_opened_and_repeated_in_the_next_command(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    nowhere = cli("export", tiny_checkpoint, tmp_path / "out", "--adapter", tmp_path / "nowhere")
    assert nowhere.exit_code != 0
    assert "adapter_config.json" in nowhere.stderr
    options = ("--adapter", _empty_adapter(tmp_path / "a"), "--adapter", _empty_adapter(tmp_path / "b"))
    result = cli("export", tiny_checkpoint, tmp_path / "out", "--dry-run", *options)
    assert result.exit_code == 0, result.stderr
    assert f"--adapter {tmp_path / 'a'} --adapter {tmp_path / 'b'}" in result.stderr


def _empty_adapter(folder: Path) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_bundle_is_no_checkpoint(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("mllm_edge.cli.export.load_exporter", None)  # would fail: it is told before
    result = cli("export", str(tiny_bundle), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert "is a bundle, exported already" in result.stderr
    assert f"mllm-edge quantize {tiny_bundle} OUT --data DIR" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_may_hold_another_manifest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from mllm_edge.export.early import check_checkpoint

    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "manifest.json").write_text("{}")
    check_checkpoint(str(checkpoint))
