"""ONNX Runtime on an NVIDIA GPU: the fused half-precision graphs of target cuda, caches in the GPU's memory."""

import contextlib
import io
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda
from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime, open_graph, run_bound
from mllm_edge.runtime.log import logger
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.runtime.machine.nvml import nvidia_gpus
from mllm_edge.spec import Variant

__all__ = ["OnnxRuntimeCuda", "usable"]

_PROVIDER = "CUDAExecutionProvider"
_INSTALL = "pip uninstall onnxruntime, then pip install onnxruntime-gpu; on a Jetson see `mllm-edge doctor`"
_OPTIONS = {
    # Its default tries all of cuDNN's algorithms anew for each number of tiles.
    "cudnn_conv_algo_search": "HEURISTIC",
    # Its default doubles what is reserved, of a memory that a small board's processor shares.
    "arena_extend_strategy": "kSameAsRequested",
}


def usable() -> bool:
    """Whether this machine has a GPU, and ONNX Runtime the provider for it."""
    try:
        return bool(read_machine(Path("/"), shutil.which("nvidia-smi")).gpus and OnnxRuntimeCuda())
    except BackendError:
        return False


class OnnxRuntimeCuda:
    """Executes the variants for target cuda on the first GPU.

    `provider` and `device`: with CPUExecutionProvider and cpu everything but the kernels is the same, on any machine.
    Raises BackendError when ONNX Runtime is missing or was built without CUDA.
    """

    name = target = "cuda"

    def __init__(self, provider: str = _PROVIDER, device: str = "cuda"):
        self._ort, self._provider, self._device = import_onnxruntime(_INSTALL), provider, device
        if provider not in self._ort.get_available_providers():
            raise BackendError(f"ONNX Runtime {self._ort.__version__} has no {provider}", _INSTALL)
        self._missing = _preload(self._ort) if device == "cuda" else ""

    def open(self, path: Path, variant: Variant) -> "_Session":
        """Open a graph; raises BackendError with ONNX Runtime's own reason, or when it cannot use the GPU."""
        options = _OPTIONS if self._provider == _PROVIDER else {}
        graph = open_graph(self._ort, path, variant, self._ort.SessionOptions(), [(self._provider, options)])
        if self._provider not in graph.get_providers():
            # ONNX Runtime says so on standard error only, and takes the CPU.
            missing = f": {self._missing}" if self._missing else ""
            raise BackendError(f"{path}: ONNX Runtime has {self._provider}, but cannot use it here{missing}", _INSTALL)
        return _Session(self._ort, graph, self._device)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> "_Buffer":
        """Zeroed memory on the device."""
        value = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0)
        return _Buffer(value, 0, shape, np.dtype(dtype))

    def memory_used(self) -> int | None:
        """Bytes of device memory in use, by all processes; None where neither cuda-bindings nor the driver tell."""
        return self._used_memory() if self._device == "cuda" else None

    @cached_property
    def _used_memory(self) -> Callable[[], int | None]:
        try:
            return Cuda().used_memory
        except BackendError:
            return _told_by_the_driver


def _preload(ort: Any) -> str:
    """Load CUDA's libraries, which may lie in Python packages; the first that does not load, in ONNX Runtime's words.
    It prints them, and standard output belongs to answers."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    lines = said.getvalue().strip().splitlines()
    for line in lines:
        logger.info("ONNX Runtime: %s", line)
    return lines[0] if lines else ""


def _told_by_the_driver() -> int | None:
    try:
        (gpu,) = nvidia_gpus()  # which of several is CUDA's first, it does not say
        return gpu.memory_used()
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Buffer:
    """Memory on the device, or a contiguous part of it that begins at the element `start`."""

    value: Any
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        return int(self.value.data_ptr()) + self.start * self.dtype.itemsize

    def read(self, axis: int, length: int) -> np.ndarray:
        return self._mine(self.value.numpy())[(slice(None),) * axis + (slice(length),)].copy()

    def write(self, axis: int, values: np.ndarray) -> None:
        # ONNX Runtime copies whole tensors between host and device, no parts.
        whole = self.value.numpy().copy()
        self._mine(whole)[(slice(None),) * axis + (slice(values.shape[axis]),)] = values
        self.value.update_inplace(whole)

    def part(self, axis: int, start: int, stop: int) -> "_Buffer":
        assert math.prod(self.shape[:axis]) == 1, "a part must be contiguous"
        first = self.start + start * math.prod(self.shape[axis + 1 :])
        return _Buffer(self.value, first, (*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), self.dtype)

    def _mine(self, whole: np.ndarray) -> np.ndarray:
        return whole.reshape(-1)[self.start :][: math.prod(self.shape)].reshape(self.shape)


class _Session:
    """One IO binding: buffers are used where they lie. ONNX Runtime copies a host array when it is bound, to where the
    graph wants it; those that may have changed are bound again at each run."""

    limits: Mapping[str, int] = {}

    def __init__(self, ort: Any, session: Any, device: str):
        self._ort, self._session, self._device = ort, session, device
        self._binding = session.io_binding()
        self._outputs = [output.name for output in session.get_outputs()]
        self._changing: dict[str, np.ndarray] = {}
        self._targets: dict[str, Any] = {}
        self._bound: dict[str, bool] = {}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, value in inputs.items():
            self._changing.pop(name, None)
            if not isinstance(value, _Buffer):
                value = np.asarray(value, order="C")
                if value.flags.writeable:
                    self._changing[name] = value
            self._bind_input(name, value)
        for name, value in outputs.items():
            self._targets[name] = value  # what is bound stays as long
            self._bound[name] = True
            if isinstance(value, _Buffer):
                self._binding.bind_output(name, *self._place(value))
            else:
                self._binding.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(value))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, value in self._changing.items():
            if name not in feeds:
                self._bind_input(name, value)
        self.bind(feeds, {})
        return run_bound(self._session, self._binding, self._outputs, self._bound)

    def _bind_input(self, name: str, value: Any) -> None:
        if isinstance(value, _Buffer):
            self._binding.bind_input(name, *self._place(value))
        else:
            self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(value))

    def _place(self, buffer: _Buffer) -> tuple[Any, ...]:
        return self._device, 0, buffer.dtype.type, buffer.shape, buffer.address
