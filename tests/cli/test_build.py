"""`mllm-edge build`: with TensorRT for RTX for GPUs that are not here, and on a stand-in for one that is."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.export.pipeline import export
from mllm_edge.lock import locked
from mllm_edge.runtime.build import build_engines, plan_build
from tests.runtime.tensorrt_stand_in import install

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "bundle"
    targets = ("tensorrt", "tensorrt-10.3")
    export(str(tiny_checkpoint), out, targets=targets, recipe_name="fp16", verify_mode="off")
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without cuda-bindings."""
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)


class Recorder:
    """Stages and how much of them was done; `stop` after so many steps."""

    def __init__(self, stop: int = 0) -> None:
        self.done: dict[str, list[int]] = {}
        self._stop = stop

    def stage(self, title: str, total: int = 0) -> None:
        self.done[title] = [total]

    def advance(self, amount: int) -> None:
        self.done[list(self.done)[-1]].append(amount)
        if sum(len(steps) for steps in self.done.values()) == self._stop:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("target", "device"), [("tensorrt", "sm86"), ("tensorrt-10.3", "sm75")])
def test_real_engines_for_a_gpu_that_is_not_here(cli: Cli, bundle: Path, target: str, device: str) -> None:
    arguments = ("build", bundle, "--device", device, "--target", target, "--max-seq", 300, "--json")
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    assert f"{device}, target {target}: 320 tokens" in result.stderr
    assert "of memory" in result.stderr
    report = json.loads(result.stdout)
    assert report["module"]["name"] == "tensorrt_rtx"
    assert report["limits"] == {"max_seq": 320, "max_images": 4, "max_batch": 1, "max_rows": 16}
    assert [engine["component"] for engine in report["engines"]] == list(Bundle.load(bundle).manifest.components)
    for engine in report["engines"]:
        assert (bundle / engine["file"]).stat().st_size == engine["nbytes"] > 0
        assert engine["seconds"] > 0
        assert engine["warnings"] == [], "nothing that a user would wonder about"
    again = json.loads(cli(*arguments).stdout)
    assert [engine["seconds"] for engine in again["engines"]] == [0, 0, 0]
    files = {path.name for path in (bundle / "engines").iterdir()}
    assert cli(*arguments[:-2], 200).exit_code == 0
    assert {path.name for path in (bundle / "engines").iterdir()} == files


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-10.3"])
def test_real_engines_of_segments(cli: Cli, bundle: Path, target: str) -> None:
    """The checks of what TensorRT made of a graph hold in each: all of its inputs are read, its caches in place."""
    arguments = ("build", bundle, "--device", "sm86", "--target", target, "--max-seq", 128, "--json", "--segments")
    result = cli(*arguments, 3)
    assert result.exit_code == 0, result.stderr
    assert "the decoder in 3 segments, one after the other: " in result.stderr
    assert "building segment 2 of 3 of decoder" in result.stderr
    found = [e for e in json.loads(result.stdout)["engines"] if e["component"] == "decoder"]
    assert [(e["segment"], e["segments"], e["seconds"] > 0) for e in found] == [(i, 3, True) for i in (1, 2, 3)]
    assert all((bundle / e["file"]).stat().st_size == e["nbytes"] > 0 for e in found)
    assert len({e["file"] for e in found}) == 3
    # auto is content with what is there; another number is not.
    assert [e["seconds"] for e in json.loads(cli(*arguments, "auto").stdout)["engines"]] == [0] * 5
    (found,) = [e for e in json.loads(cli(*arguments, 1).stdout)["engines"] if e["component"] == "decoder"]
    assert found["seconds"] > 0
    assert not list((bundle / "engines").glob("*-seg*"))


@pytest.mark.usefixtures("no_gpu")
def test_progress_comes_from_tensorrt(bundle: Path) -> None:
    recorder = Recorder()
    build_engines(plan_build(bundle, device="sm86"), recorder)
    assert list(recorder.done) == ["building vision_encoder", "building connector", "building decoder"]
    for total, *steps in recorder.done.values():
        assert len(steps) > 5
        assert all(step >= 0 for step in steps)
        assert 0.9 * total <= sum(steps) <= total


@pytest.mark.usefixtures("no_gpu")
def test_a_build_can_be_stopped(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_engines(plan_build(bundle, device="sm86"), Recorder(stop=7))
    assert not list((bundle / "engines").glob("*.engine*"))
    assert len(build_engines(plan_build(bundle, device="sm86"), Recorder())) == 3


@pytest.mark.usefixtures("no_gpu")
def test_a_stopped_build_goes_on_at_the_next_segment(bundle: Path) -> None:
    plan = plan_build(bundle, device="sm86", segments=3)
    recorder = Recorder()
    build_engines(plan, recorder)
    steps = [len(done) for done in recorder.done.values()]
    shutil.rmtree(bundle / "engines")
    with pytest.raises(KeyboardInterrupt):
        build_engines(plan, Recorder(stop=sum(steps[:3]) + 5))
    assert [path.stem[-8:] for path in (bundle / "engines").glob("decoder*.engine")] == ["-seg1of3"]
    assert not list((bundle / "engines").glob("*.part"))
    recorder = Recorder()
    build_engines(plan, recorder)
    assert [title for title in recorder.done if "building" in title] == [
        f"building segment {i} of 3 of decoder" for i in (2, 3)
    ]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "sm87"], ["does not build for sm87", "sm86"]),
        (["--device", "current"], ["no compute capability", "--device auto"]),
        ([], ["cuda-bindings are not installed", "--device sm86"]),
        (["--device", "sm86", "--max-seq", "1025"], ["--max-seq 1025", "1024"]),
        (["--device", "sm86", "--max-seq", "1"], ["--max-seq 1 "]),
        (["--device", "sm86", "--segments", "99"], ["segments at most, not 99", "fix: --segments "]),
    ],
)
def test_what_cannot_be_built(cli: Cli, bundle: Path, options: list[str], words: list[str]) -> None:
    result = cli("build", bundle, *options)
    assert result.exit_code == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not (bundle / "engines").exists()


def test_a_bundle_without_graphs_for_tensorrt(cli: Cli, tiny_bundle: Path) -> None:
    result = cli("build", tiny_bundle, "--device", "sm86")
    assert result.exit_code == 1
    assert "no graphs for TensorRT, only for cpu" in result.stderr
    assert "--target tensorrt" in result.stderr
    assert "no variant" in cli("build", tiny_bundle, "--device", "sm86", "--target", "tensorrt").stderr


# ---------------------------------------------------------------- with a GPU
def test_the_gpu_here(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch)
    result = cli("build", bundle, "--max-seq", 128, "--max-batch", 2)
    assert result.exit_code == 0, result.stderr
    assert "TensorRT 10.16.1, sm87, target tensorrt: 128 tokens, 4 images or tiles, batch 2" in result.stderr
    assert "building decoder" in result.stderr
    assert machine.workspaces == [machine.free // 2] * 3
    asked = cli("run", bundle, "Hello.", "--backend", "tensorrt", "--max-new-tokens", 4)
    assert asked.exit_code == 0, asked.stderr
    assert "building" not in asked.stderr
    assert machine.counts["builds"] == 3
    assert machine.counts["runs"] > 0


def test_warnings_are_shown_once(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch)
    machine.warn["build"] = "Detected layernorm in half precision"
    result = cli("build", bundle, "--json")
    assert result.stderr.count(f"TensorRT 10.16.1 warns: {machine.warn['build']}") == 1
    assert all(engine["warnings"] == [machine.warn["build"]] for engine in json.loads(result.stdout)["engines"])
    again = cli("build", bundle, "--json")
    assert "warns" not in again.stderr
    assert all(engine["warnings"] == [] for engine in json.loads(again.stdout)["engines"])


def test_run_says_that_it_builds_and_what_it_does_without(cli: Cli, bundle: Path, monkeypatch: Any) -> None:
    machine = install(monkeypatch)
    machine.refuse["vision_encoder"] = "no kernel"
    result = cli("run", bundle, "Hello.", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.stderr
    assert "building the engine of decoder.tensorrt.onnx for sm87 with TensorRT 10.16.1, once" in result.stderr
    assert "vision_encoder runs on the CPU instead of tensorrt: " in result.stderr
    assert "no kernel" in result.stderr


def test_jetpack_6_gets_the_older_target(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.3.0")
    plan = plan_build(bundle)
    assert (plan.target, plan.device, plan.module.title) == ("tensorrt-10.3", "sm87", "TensorRT 10.3.0")
    with pytest.raises(BackendError, match=r"builds for the GPU it runs on \(sm87\), not for sm86"):
        plan_build(bundle, device="sm86")


@pytest.mark.parametrize("segments", ["auto", "2"])
def test_what_the_plan_tells_about_memory(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch, segments: str
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("mllm_edge.runtime.backends.tensorrt_engines._WEIGHTS_TIMES", 0)
    monkeypatch.setattr("mllm_edge.runtime.backends.tensorrt_engines._BUILDER", 1 << 60)
    result = cli("build", bundle, "--segments", segments)
    assert "that is likely too little" in result.stderr
    told = "the decoder cannot be cut into segments that would take less"
    assert (told in result.stderr) == (segments == "auto")


def test_memory_that_is_too_small(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch)
    machine.refuse["decoder"] = "Error Code 2: OutOfMemory"
    monkeypatch.setattr("mllm_edge.runtime.backends.tensorrt_engines._BUILDER", 1 << 60)
    result = cli("build", bundle)
    assert result.exit_code == 1
    assert "likely too little" in result.stderr
    assert "not enough memory to build the engine" in result.stderr
    assert "--max-seq" in result.stderr
    assert len(list((bundle / "engines").glob("*.engine"))) == 2, "those that are done stay"


@pytest.mark.usefixtures("no_gpu")
def test_a_second_build_is_told_who_works_there(cli: Cli, bundle: Path) -> None:
    with locked(bundle):
        result = cli("build", bundle, "--device", "sm86", "--target", "tensorrt", "--max-seq", 300)
    assert result.exit_code == 1
    assert f"works on it (process {os.getpid()} on " in result.stderr
    assert not (bundle / "engines").exists()
