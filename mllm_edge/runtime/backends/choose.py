"""Which backend runs a bundle on this machine."""

from collections.abc import Callable

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.base import BACKENDS, TENSORRT, Backend
from mllm_edge.runtime.machine.threads import Threads

__all__ = ["open_backend"]


def open_backend(
    name: str = "auto",
    threads: int | Threads | None = None,
    target: str = "cpu",
    *,
    bundle: Bundle | None = None,
    max_seq: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Backend:
    """The backend called `name`; `auto` takes TensorRT where this machine and the decoder of `bundle` are made for it,
    else ONNX Runtime's CUDA provider likewise, else the CPU, which always works. That one executes the graphs
    made for `target`: other targets' serve comparisons.

    `max_seq`: tokens that a sequence must be able to have. `notice` is told about what takes long. Raises BackendError
    for an unknown name or a runtime that is not installed.
    """
    if name == "auto":
        name = "cpu" if bundle is None else _best(bundle)
    if name == "cpu":
        from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

        return OnnxRuntimeCpu(threads, target)
    if name == "cuda":
        from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda()
    if name in TENSORRT:
        from mllm_edge.runtime.backends.tensorrt import TensorRT

        return TensorRT(name, max_seq, notice)
    raise BackendError(f"unknown backend {name!r}", f"use --backend {', '.join(BACKENDS)}")


def _best(bundle: Bundle) -> str:
    """The first target of the GPU that the decoder has and this machine executes; cpu where there is none."""
    targets = [variant.target for variant in bundle.manifest.components["decoder"].variants]
    if any(target in targets for target in TENSORRT):
        from mllm_edge.runtime.backends.tensorrt_engines import usable

        for target in TENSORRT:
            if target in targets and usable(target):
                return target
    if "cuda" in targets:
        from mllm_edge.runtime.backends import onnxruntime_cuda

        return "cuda" if onnxruntime_cuda.usable() else "cpu"
    return "cpu"
