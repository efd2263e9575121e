"""The few CUDA calls that a backend needs: memory, copies, one stream, graphs. Through cuda-bindings, on device 0."""

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.install import install_hint
from mllm_edge.runtime.foreign import pass_on

__all__ = ["OLD_DRIVER", "Cuda", "Graph", "Memory", "Pinned", "gpu_model", "gpu_problem"]

# What CUDA says where its library, which cuda-bindings hold from 12.9 on, is newer than the driver.
OLD_DRIVER = "cudaErrorInsufficientDriver"

_INSTALL = f"{install_hint('rtx')}, or on a Jetson with jetson in the place of rtx"


class Cuda:
    """One stream on the first GPU; everything is enqueued there in order. Raises BackendError when there is no GPU or
    no cuda-bindings."""

    def __init__(self) -> None:
        self._api = _import()
        problem = _no_gpu(self._api)
        if problem:
            first = (
                "the NVIDIA driver is missing, or too old for these cuda-bindings: " if problem == OLD_DRIVER else ""
            )
            fix = f"{first}see `mllm-edge doctor`, or use --backend cpu"
            raise BackendError(f"no NVIDIA GPU can be used: {problem}", fix)
        self.call("cudaSetDevice", 0)
        attributes = self._api.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        self.capability = f"sm{major}{minor}"
        self._stream = self.call("cudaStreamCreate")
        self.stream = int(self._stream)
        _free_with(self, self, "cudaStreamDestroy", self._stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """A CUDA function's result; raises BackendError with CUDA's name of the error."""
        status, *results = getattr(self._api, name)(*arguments)
        if int(status):
            raise BackendError(f"CUDA: {name} failed: {_name(self._api, status)}")
        return results[0] if len(results) == 1 else tuple(results)

    def free_memory(self) -> int:
        """Bytes of device memory that are free; on a Jetson that is the system's memory."""
        return int(self.call("cudaMemGetInfo")[0])

    def used_memory(self) -> int:
        """Bytes of device memory in use, by all processes; on a Jetson that is the system's memory."""
        free, total = self.call("cudaMemGetInfo")
        return int(total) - int(free)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device; it may be changed as soon as this returns."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
            self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a C-contiguous array; it is there after `wait`."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy from memory that the device reaches to its own."""
        if nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDefault  # the source may be page-locked, on the host
            self.call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        if nbytes:
            self.call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def wait(self) -> None:
        """Until everything enqueued is done."""
        self.call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """Record what `enqueue` puts on the stream, without running it; raises BackendError when it cannot be."""
        self.call("cudaStreamBeginCapture", self._stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            enqueue()
        finally:
            # Ends the capture in any case: a stream left capturing is of no use to anyone.
            status, graph = self._api.cudaStreamEndCapture(self._stream)
        if int(status):
            raise BackendError(f"CUDA: the step cannot be captured: {_name(self._api, status)}")
        try:
            return Graph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: "Graph") -> None:
        """Enqueue a recorded graph."""
        self.call("cudaGraphLaunch", graph.handle, self._stream)


class Graph:
    """Recorded work, freed with this object."""

    def __init__(self, cuda: Cuda, handle: Any):
        self.handle = handle
        _free_with(self, cuda, "cudaGraphExecDestroy", handle)


class Memory:
    """Device memory, freed with this object. Raises BackendError when the GPU has not as much."""

    def __init__(self, cuda: Cuda, nbytes: int):
        self.nbytes = nbytes
        try:
            self.address = int(cuda.call("cudaMalloc", max(nbytes, 1)))
        except BackendError as e:
            free = cuda.free_memory()
            raise BackendError(
                f"{e.message}: {nbytes} bytes wanted, {free} are free on the GPU",
                "close other programs, or `mllm-edge build` with a smaller --max-seq or --max-batch",
            ) from e
        _free_with(self, cuda, "cudaFree", self.address)


class Pinned:
    """Page-locked host memory as an array, freed with this object: copies from the device take one hop less."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: Any):
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(cuda.call("cudaMallocHost", max(nbytes, 1)))
        memory = (ctypes.c_byte * nbytes).from_address(address)
        self.array = np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
        _free_with(self, cuda, "cudaFreeHost", address)


def gpu_problem() -> str:
    """CUDA's name of what keeps cuda-bindings from every GPU; "" where nothing does, or there are no cuda-bindings."""
    try:
        return _no_gpu(_import())
    except BackendError:
        return ""


def gpu_model() -> str:
    """The first GPU's name and its number of multiprocessors, which tell models of one compute capability apart; ""
    where there is none."""
    try:
        api = _import()
    except BackendError:
        return ""
    status, found = api.cudaGetDeviceProperties(0)
    if int(status):
        return ""
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return f"{name.strip(chr(0))}, {found.multiProcessorCount} multiprocessors"


def _free_with(owner: Any, cuda: Cuda, function: str, handle: Any) -> None:
    # Not at the interpreter's exit: the driver may be gone by then, and frees everything itself.
    weakref.finalize(owner, getattr(cuda._api, function), handle).atexit = False


def _no_gpu(api: Any) -> str:
    """Why there is no GPU; empty when there is one."""
    status, count = api.cudaGetDeviceCount()
    if int(status):
        return _name(api, status)
    return "" if count else "CUDA sees none"


def _name(api: Any, status: Any) -> str:
    _, name = api.cudaGetErrorName(status)
    return name.decode() if isinstance(name, bytes) else str(name)


def _import() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as e:
        pass_on(e)
        raise BackendError(f"cuda-bindings are not installed ({e})", _INSTALL) from e
    return runtime
