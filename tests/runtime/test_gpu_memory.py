"""Device memory in a profile: what CUDA or the driver tell, by stage and beside the prediction."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_edge.cli.profile_report import report
from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from mllm_edge.runtime.profiling import files, memory
from mllm_edge.runtime.profiling.measure import profile
from tests.runtime.tensorrt_stand_in import StandIn
from tests.runtime.test_profile import check_schema

USED = 3 << 30


def test_tensorrt_tells_it_by_stage(machine: StandIn, bundle: Path) -> None:
    others = machine.total - machine.free
    options: dict[str, Any] = {"backend": "tensorrt", "notice": lambda text: None}
    result = profile(bundle, "Hi", new_tokens=3, warmup=0, iterations=1, **options)
    m = result.memory
    assert m.gpu is not None
    assert m.gpu >= others + m.kv_cache
    assert not any("GPU memory" in note for note in m.notes)
    check_schema(result.as_dict(), files.schema(), files.schema())
    assert result.as_dict()["memory"]["gpu"] == m.gpu
    text = report(result)
    assert "in use, by all processes; predicted " in text
    if sys.platform == "linux":  # elsewhere a call cannot be watched
        assert m.gpu_stages is not None
        assert tuple(m.gpu_stages) == ("open", *result.runs[0].cold.stages)
        assert m.gpu_stages["open"] >= others
        assert m.gpu_stages["allocate"] - m.gpu_stages["embed"] == m.kv_cache
        assert m.gpu_stages["prefill"] > m.gpu_stages["allocate"], "inputs and outputs of the first run"
        assert "GPU memory after it: open " in text


def test_the_prediction_is_without_the_base() -> None:
    assert memory.Predicted(weights=5, kv_cache=3, activations=2, images=4, total=1014).on_gpu == 10


@pytest.fixture
def onnxruntime_cuda() -> OnnxRuntimeCuda:
    """On the processor, but as if it were the GPU."""
    backend = OnnxRuntimeCuda("CPUExecutionProvider", "cpu")
    assert backend.memory_used() is None, "there is none"
    backend._device = "cuda"
    return backend


def test_onnxruntime_tells_it_by_cuda(machine: StandIn, onnxruntime_cuda: OnnxRuntimeCuda) -> None:
    assert onnxruntime_cuda.memory_used() == machine.total - machine.free
    machine.free -= 1000
    assert memory.gpu_memory(onnxruntime_cuda) == machine.total - machine.free


@pytest.mark.parametrize(("gpus", "status", "expected"), [(1, 0, USED), (2, 0, None), (1, 3, None)])
def test_onnxruntime_tells_it_by_the_driver(
    onnxruntime_cuda: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch, gpus: int, status: int, expected: int | None
) -> None:
    """Without cuda-bindings; of one GPU, which then is CUDA's."""

    def count(target: Any) -> int:
        target._obj.value = gpus
        return 0

    def information(handle: object, target: Any) -> int:
        ctypes.memmove(ctypes.addressof(target._obj), (ctypes.c_ulonglong * 3)(8 << 30, 5 << 30, USED), 24)
        return status

    def error(status: int) -> bytes:
        return b"Not Supported"

    library = SimpleNamespace(
        nvmlErrorString=error,
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetCount_v2=count,
        nvmlDeviceGetHandleByIndex_v2=lambda index, handle: 0,
        nvmlDeviceGetName=lambda handle, buffer, size: 0,
        nvmlDeviceGetMemoryInfo=information,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert onnxruntime_cuda.memory_used() == expected


def test_nothing_tells_it(onnxruntime_cuda: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no such file")))
    assert memory.gpu_memory(onnxruntime_cuda) is None
