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

__all__ = ["OLD_DRIVER", "Cuda", "Graph", "Memory", "Pinned", "Staging", "gpu_model", "gpu_problem"]

# What CUDA says where its library, which cuda-bindings hold from 12.9 on, is newer than the driver.
OLD_DRIVER = "cudaErrorInsufficientDriver"

_INSTALL = f"{install_hint('rtx')}, or on a Jetson with jetson in the place of rtx"


class Cuda:
    """One stream on the first GPU; everything is enqueued there in order. It waits for no other stream by itself: work
    of other libraries is put before ours by `order`. `waits` counts how often all that was enqueued was waited for.

    Raises BackendError when there is no GPU or no cuda-bindings.
    """

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
        # A stream that waits for the legacy one would forbid its use to everyone while a graph is recorded.
        self._stream = self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self.waits = 0
        kinds = self._api.cudaMemcpyKind
        self._up, self._down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._between = kinds.cudaMemcpyDefault  # the source may be page-locked, on the host
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
            self._copy(address, array.ctypes.data, array.nbytes, self._up)
            self.wait()  # some devices read pageable memory in place, and late

    def send(self, address: int, source: int, nbytes: int) -> None:
        """Copy page-locked memory to the device; it must stay as it is until `wait`."""
        self._copy(address, source, nbytes, self._up)

    def fetch(self, target: int, address: int, nbytes: int) -> None:
        """Copy from the device to page-locked memory; it is there after `wait`."""
        self._copy(target, address, nbytes, self._down)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a C-contiguous array; it is there after `wait`."""
        if array.nbytes:
            self._copy(array.ctypes.data, address, array.nbytes, self._down)

    def copy(self, *copies: tuple[int, int, int]) -> None:
        """Copy from memory that the device reaches to its own: to where, from where, how many bytes."""
        enqueue, kind, stream = self._api.cudaMemcpyAsync, self._between, self._stream
        for target, source, nbytes in copies:
            if nbytes:
                (status, *_) = enqueue(target, source, nbytes, kind, stream)
                if status:
                    raise BackendError(f"CUDA: cudaMemcpyAsync failed: {_name(self._api, status)}")

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        (status, *_) = self._api.cudaMemcpyAsync(target, source, nbytes, kind, self._stream)
        if status:
            raise BackendError(f"CUDA: cudaMemcpyAsync failed: {_name(self._api, status)}")

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        if nbytes:
            self.call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def wait(self) -> None:
        """Until everything enqueued is done."""
        self.call("cudaStreamSynchronize", self._stream)
        self.waits += 1

    def order(self, stream: int | None) -> None:
        """What others have enqueued comes before all that is enqueued here from now on. `stream`: theirs, as
        `__cuda_array_interface__` numbers them; None: any."""
        if stream is None:
            self.call("cudaDeviceSynchronize")
        else:
            self.call("cudaStreamSynchronize", stream)

    def capture(self, enqueue: Callable[[], None], instead_of: "Graph | None" = None) -> "Graph":
        """Record what `enqueue` puts on the stream, without running it; raises BackendError when it cannot be.

        `instead_of`: a graph that is not wanted any more; where the new one differs in shapes and addresses only, it
        becomes the new one, which costs a fraction.
        """
        self.call("cudaStreamBeginCapture", self._stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            enqueue()
        finally:
            # Ends the capture in any case: a stream left capturing is of no use to anyone.
            status, graph = self._api.cudaStreamEndCapture(self._stream)
        if int(status):
            raise BackendError(f"CUDA: the step cannot be captured: {_name(self._api, status)}")
        try:
            if instead_of is not None and not int(self._api.cudaGraphExecUpdate(instead_of.handle, graph)[0]):
                return instead_of
            return Graph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: "Graph") -> None:
        """Enqueue a recorded graph."""
        (status, *_) = self._api.cudaGraphLaunch(graph.handle, self._stream)
        if status:
            raise BackendError(f"CUDA: cudaGraphLaunch failed: {_name(self._api, status)}")


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
    """Page-locked host memory as bytes, freed with this object: copies to and from the device take one hop less."""

    def __init__(self, cuda: Cuda, nbytes: int):
        self.address = int(cuda.call("cudaMallocHost", max(nbytes, 1)))
        memory: Any = (ctypes.c_byte * nbytes).from_address(self.address)
        self.bytes = np.frombuffer(memory, np.uint8)
        _free_with(self, cuda, "cudaFreeHost", self.address)


class Staging:
    """Page-locked host memory and device memory of one layout, so that what lies side by side crosses in one copy. It
    never shrinks: addresses stay."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._sent = cuda, -1
        self._host: Pinned | None = None
        self._device: Memory | None = None

    @property
    def address(self) -> int:
        """Where it begins on the device."""
        assert self._device is not None, "reserve() comes first"
        return self._device.address

    def reserve(self, nbytes: int, most: int) -> bool:
        """Room for so many bytes, or when that is more than before, for `most` at once; whether something lay there."""
        before = self._device
        if before is not None and before.nbytes >= nbytes:
            return False
        if before is not None:
            self._cuda.wait()  # what is on its way lands
            nbytes = max(nbytes, most)
        self._host, self._device = Pinned(self._cuda, nbytes), Memory(self._cuda, nbytes)
        return before is not None

    def view(self, offset: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A part of the host's side as an array."""
        assert self._host is not None, "reserve() comes first"
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._host.bytes[offset : offset + nbytes].view(dtype).reshape(shape)

    def begin(self) -> None:
        """What was sent before has left the host's side, which may be written now."""
        if self._sent == self._cuda.waits:
            self._cuda.wait()

    def send(self, begin: int, end: int) -> None:
        """Copy a part to the device."""
        assert self._host is not None, "reserve() comes first"
        self._cuda.send(self.address + begin, self._host.address + begin, end - begin)
        self._sent = self._cuda.waits

    def fetch(self, begin: int, end: int) -> None:
        """Copy a part from the device; it is there after `Cuda.wait`."""
        assert self._host is not None, "reserve() comes first"
        self._cuda.fetch(self._host.address + begin, self.address + begin, end - begin)


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
