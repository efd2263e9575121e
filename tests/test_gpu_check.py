"""scripts/gpu_check.py without a GPU: what it says of each engine, and that it sees a wrong result."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from tests.runtime.tensorrt_stand_in import install

FILE = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
TARGETS = ["cuda", "tensorrt", "tensorrt-10.3"]
LINES = [
    ("TensorRT", "tensorrt"),
    ("TensorRT", "tensorrt-10.3"),
    ("TensorRT for RTX", "tensorrt"),
    ("TensorRT for RTX", "tensorrt-10.3"),
    ("ONNX Runtime CUDA", "cuda"),
]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    export(str(tiny_checkpoint), out, targets=TARGETS, recipe_name="fp16", verify_mode="off")
    return out


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    module.CALLS = module.WARMUP = 1  # type: ignore[attr-defined]
    yield module
    del sys.modules["gpu_check"]


def run(script: Any, bundle: Path, folder: Path) -> tuple[int, dict[str, Any]]:
    code = script.main([str(bundle), "--json", str(folder / "found.json")])
    return code, json.loads((folder / "found.json").read_text())


def verdicts(found: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(line["engine"], line["target"]): line["verdict"] for line in found["lines"]}


def test_without_a_gpu_every_line_says_so(
    script: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, gpus=0)
    code, found = run(script, bundle, tmp_path)
    assert code == 0
    assert list(verdicts(found)) == LINES
    assert set(verdicts(found).values()) == {"not executed"}
    assert all(line["why"] for line in found["lines"])
    text = capsys.readouterr().out
    assert text.count(": not executed: ") == len(LINES)
    assert "no NVIDIA GPU can be used" in text
    assert "no CUDAExecutionProvider" in text


def test_what_agrees(script: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    open_backend = script.open_backend
    monkeypatch.setattr(script, "open_backend", lambda name, notice: _with_cuda(open_backend, name, notice))
    code, found = run(script, bundle, tmp_path)
    assert code == 0
    assert list(verdicts(found).values()) == ["agrees", "agrees", "not executed", "not executed", "agrees"]
    for line in found["lines"]:
        if line["verdict"] == "agrees":
            assert set(line["errors"]) == {"vision_encoder", "connector", "prefill_logits", "decode_logits"}
            assert line["tokens"] == "48/48"
            assert line["tokens_per_second"] > 0
            assert line["milliseconds"]["prefill"] > 0
            assert ("graphs" in line["seen"]) == (line["engine"] == "TensorRT")
        else:
            assert "needs TensorRT for RTX" in line["why"]


def test_what_is_told_of_tensorrt(
    script: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = install(monkeypatch)
    machine.warn["open"] = "CUDA lazy loading is not enabled"
    _, found = run(script, bundle, tmp_path)
    line, other = found["lines"][:2]
    seen = line["seen"]
    assert line["host_ms"] > 0
    graphs = seen["graphs"]
    assert graphs["recorded"] > 0
    assert graphs["replayed"] == seen["calls"]["cudaGraphLaunch"] > 20
    assert graphs["failed"] == 0
    decoder = max(seen["engines"], key=lambda engine: engine["tensors"])
    caches = 2 * len(Bundle.load(bundle).manifest.model.state[0].layers)
    assert (decoder["profiles"], decoder["aliases"]) == (2, caches)
    assert decoder["working_memory"] > 0
    assert max(engine["aliases"] for engine in other["seen"]["engines"]) == 0
    assert seen["warnings"] == [machine.warn["open"]]
    text = capsys.readouterr().out
    assert f"TensorRT, tensorrt: warns: {machine.warn['open']}" in text
    assert "/".join(str(n) for n in graphs.values()) in text
    machine.trouble["cudaGraphInstantiate"] = 900
    code, found = run(script, bundle, tmp_path)
    graphs = found["lines"][0]["seen"]["graphs"]
    assert (code, graphs["recorded"], graphs["replayed"]) == (0, 0, 0)
    assert graphs["failed"] > 0
    assert "TensorRT, tensorrt: cudaGraphInstantiate failed" in capsys.readouterr().out


def test_cuda_alone(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = install(monkeypatch)
    file = tmp_path / "cuda.json"
    code = script.main(["--cuda-only", "--json", str(file)])
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    assert code == 0, text
    cuda = found["cuda"]
    assert cuda["GPU"] == "Orin, 16 multiprocessors, sm87"
    for name in ("copies and zeros", "memory is given back", "capture and replay"):
        assert cuda[name] == "right", name
    assert "cudaErrorMemoryAllocation" in cuda["out of memory"]
    assert cuda["a torch tensor of another stream"].startswith("not executed: ")
    assert all(f"{name}: {what}" in text for name, what in cuda.items())
    machine.trouble["cudaMemsetAsync"] = 700
    assert script.main(["--cuda-only"]) in (0, 1)
    assert "cudaErrorIllegalAddress" in capsys.readouterr().out
    install(monkeypatch, gpus=0)
    assert script.main(["--cuda-only"]) == 2


def test_names_of_cuda() -> None:
    """The scripts call nothing that the bindings do not have."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    text = "".join((FILE.parent / name).read_text(encoding="utf-8") for name in ("gpu_cuda.py", "gpu_watch.py"))
    kinds = (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode, runtime.cudaDeviceAttr)
    names = set(re.findall(r"\bcuda[A-Z]\w+", text))
    assert len(names) > 25
    assert [name for name in sorted(names) if not any(hasattr(kind, name) for kind in kinds)] == []


def _with_cuda(open_backend: Any, name: str, notice: Any) -> Any:
    return OnnxRuntimeCuda("CPUExecutionProvider", "cpu") if name == "cuda" else open_backend(name, notice=notice)


def test_a_wrong_result_is_seen(script: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch)
    machine.spoil = {"image_features": np.float16(1.1)}
    code, found = run(script, bundle, tmp_path)
    assert code == 1
    assert verdicts(found)["TensorRT", "tensorrt"] == "disagrees"
    assert "connector 0.1" in found["lines"][0]["why"]
    machine.spoil = {"logits": np.float32("nan")}
    code, found = run(script, bundle, tmp_path)
    assert code == 1
    assert verdicts(found)["TensorRT", "tensorrt-10.3"] == "disagrees"


def test_a_part_that_is_refused_runs_nowhere_else(
    script: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(monkeypatch)
    machine.refuse["connector"] = "no kernel"
    unbuilt = shutil.copytree(bundle, tmp_path / "unbuilt", ignore=shutil.ignore_patterns("engines"))
    code, found = run(script, unbuilt, tmp_path)
    assert code == 0
    assert verdicts(found)["TensorRT", "tensorrt"] == "not executed"
    assert "connector" in found["lines"][0]["why"]
    assert "no kernel" in found["lines"][0]["why"]


def test_a_bundle_for_the_processor(script: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    code, found = run(script, tiny_bundle, tmp_path)
    assert code == 0
    assert all("no variant for target" in line["why"] for line in found["lines"])
    assert script.main([str(tmp_path / "missing")]) == 2
