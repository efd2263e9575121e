"""What CUDA itself does on this machine, without TensorRT: what the backend relies on, and what things cost.

Each line is a fact, a check or a time; one that cannot be had says why. For `gpu_check.py --cuda-only`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda, Memory, gpu_model
from mllm_edge.runtime.backends.cuda_arrays import CudaArray, taken
from mllm_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda

__all__ = ["check_cuda"]

_TIMES, _SLOW_BYTES, _SLOW_COPIES = 50, 256 << 20, 40
_LEGACY = 0


class _Device:
    """The backend's stream, and the bindings below it."""

    def __init__(self, slow: int = _SLOW_BYTES) -> None:
        self.cuda = Cuda()
        from cuda.bindings import runtime

        self.api = runtime
        self.stream = self.cuda.stream
        self._slow = slow
        self._pair: tuple[Memory, Memory] | None = None

    def work(self) -> None:
        """Some tens of milliseconds on the stream."""
        if self._pair is None:
            self._pair = Memory(self.cuda, self._slow), Memory(self.cuda, self._slow)
        for _ in range(_SLOW_COPIES):
            self.cuda.copy((self._pair[0].address, self._pair[1].address, self._slow))

    def send(self, address: int, array: np.ndarray) -> None:
        """Copy pageable memory, without waiting."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.cuda.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        found = np.empty(nbytes, np.uint8)
        self.cuda.download(found, address)
        self.cuda.wait()
        return found

    def name(self, status: Any) -> str:
        return self.api.cudaGetErrorName(status)[1].decode()


def check_cuda(slow: int = _SLOW_BYTES) -> dict[str, str]:
    """What was found, by its name. Raises BackendError when there is no GPU. `slow`: bytes of the copies that keep the
    stream busy."""
    device, found = _Device(slow), dict[str, str]()
    for name, check in _checks(device):
        try:
            found[name] = check()
        except Exception as e:  # the next lines are worth having all the same
            found[name] = f"not executed: {type(e).__name__}: {e}"
    return found


def _checks(device: _Device) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "GPU", lambda: f"{gpu_model()}, {device.cuda.capability}"
    for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"):
        yield name, lambda name=name: str(device.cuda.call(name))  # type: ignore[misc]
    for name in ("cudaDevAttrPageableMemoryAccess", "cudaDevAttrIntegrated", "cudaDevAttrConcurrentManagedAccess"):
        yield name, lambda name=name: _attribute(device, name)  # type: ignore[misc]
    yield "free memory", lambda: f"{device.cuda.free_memory() / 1e9:.2f} GB"
    yield "copies and zeros", lambda: _round_trip(device)
    yield "memory is given back", lambda: _given_back(device)
    yield "out of memory", lambda: _out_of_memory(device)
    yield "capture and replay", lambda: _replayed(device)
    yield "a capture that fails, and the stream behind it", lambda: _failed_capture(device)
    yield "the legacy stream during a capture", lambda: _legacy(device)
    for nbytes in (4 << 10, 64 << 10, 8 << 20):
        yield (
            f"{nbytes >> 10} KiB of pageable memory, overwritten behind the copy",
            lambda nbytes=nbytes: _late(device, nbytes),  # type: ignore[misc]
        )
    yield "a torch tensor of another stream", lambda: _other_stream(device)
    for nbytes in (4 << 10, 64 << 10, 600 << 10):
        yield f"copy {nbytes >> 10} KiB to the device", lambda nbytes=nbytes: _copies(device, nbytes)  # type: ignore[misc]
    yield "page-locked memory", lambda: _page_locked(device)
    for nodes in (100, 600):
        yield f"a graph of {nodes} nodes", lambda nodes=nodes: _graph_times(device, nodes)  # type: ignore[misc]
    yield "64 MiB that ONNX Runtime holds on the GPU", lambda: _onnxruntime(device)
    yield "the largest 64 of 150,000 in torch", lambda: _top(device)


def _attribute(device: _Device, name: str) -> str:
    return str(device.cuda.call("cudaDeviceGetAttribute", getattr(device.api.cudaDeviceAttr, name), 0))


def _agrees(good: bool) -> str:
    return "right" if good else "WRONG"


def _round_trip(device: _Device) -> str:
    cuda, values = device.cuda, np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    first, second = Memory(cuda, values.nbytes), Memory(cuda, values.nbytes)
    cuda.upload(first.address, values)
    cuda.copy((second.address, first.address, values.nbytes))
    same = np.array_equal(device.bytes_at(second.address, values.nbytes), values)
    cuda.clear(second.address, values.nbytes)
    return _agrees(same and not device.bytes_at(second.address, values.nbytes).any())


def _given_back(device: _Device) -> str:
    before = device.cuda.free_memory()
    held = Memory(device.cuda, 64 << 20)
    during = device.cuda.free_memory()
    del held
    return _agrees(during < before and device.cuda.free_memory() > during)


def _out_of_memory(device: _Device) -> str:
    try:
        Memory(device.cuda, 1 << 50)
    except BackendError as e:
        return e.message
    return "WRONG: a petabyte was allocated"


def _replayed(device: _Device) -> str:
    cuda, memory = device.cuda, Memory(device.cuda, 4096)
    cuda.clear(memory.address, 4096)
    ones = lambda: cuda.call("cudaMemsetAsync", memory.address, 1, 4096, device.stream)  # noqa: E731
    graph = cuda.capture(ones)
    before = device.bytes_at(memory.address, 4096)
    cuda.launch(graph)
    return _agrees(not before.any() and bool((device.bytes_at(memory.address, 4096) == 1).all()))


def _failed_capture(device: _Device) -> str:
    try:
        device.cuda.capture(device.cuda.wait)
    except BackendError as e:
        return f"{e.message}; then {_replayed(device)}"
    return "WRONG: a wait was recorded"


@contextmanager
def _capturing(device: _Device) -> Iterator[None]:
    mode = device.api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    device.cuda.call("cudaStreamBeginCapture", device.stream, mode)
    try:
        yield
    finally:
        status, graph = device.api.cudaStreamEndCapture(device.stream)
        if not int(status):
            device.api.cudaGraphDestroy(graph)


def _legacy(device: _Device) -> str:
    memory = Memory(device.cuda, 4096)
    with _capturing(device):
        (status,) = device.api.cudaMemsetAsync(memory.address, 0, 4096, _LEGACY)
    if int(status):
        return f"{device.name(status)}: others may NOT use it; then {_replayed(device)}"
    return f"others may use it; then {_replayed(device)}"


def _late(device: _Device, nbytes: int) -> str:
    """Which value arrives: that at the time of the call, or the later one."""
    array, memory = np.ones(nbytes, np.uint8), Memory(device.cuda, nbytes)
    device.work()
    device.send(memory.address, array)
    array[:] = 2
    device.cuda.wait()
    found = set(device.bytes_at(memory.address, nbytes).tolist())
    return {(1,): "the value at the call", (2,): "the LATER value"}.get(tuple(found), f"a MIXTURE: {found}")


def _other_stream(device: _Device) -> str:
    import torch

    side = torch.cuda.Stream()
    large = torch.zeros(64 << 20, device="cuda")
    tensor = torch.zeros(1 << 20, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(100):
            large.add_(1)
        tensor.fill_(3)
        array = taken(device.cuda, "x", tensor)
        assert isinstance(array, CudaArray)
        found = array.read(0, len(tensor))
    torch.cuda.synchronize()
    return _agrees(bool((found == 3).all()))


def _times(call: Callable[[], object], behind: Callable[[], object] = lambda: None) -> float:
    """Microseconds, the median of many; `behind` is not counted."""
    found = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
        behind()
    return 1e6 * float(np.median(found))


def _copies(device: _Device, nbytes: int) -> str:
    memory, cuda = Memory(device.cuda, nbytes), device.cuda
    pageable = np.zeros(nbytes, np.uint8)
    locked = int(cuda.call("cudaMallocHost", nbytes))
    kind = device.api.cudaMemcpyKind.cudaMemcpyHostToDevice

    def copy(source: int, wait: bool) -> None:
        cuda.call("cudaMemcpyAsync", memory.address, source, nbytes, kind, device.stream)
        if wait:
            cuda.wait()

    told = []
    for name, source in (("pageable", pageable.ctypes.data), ("page-locked", locked)):
        call = _times(lambda s=source: copy(s, False), cuda.wait)  # type: ignore[misc]
        whole = _times(lambda s=source: copy(s, True))  # type: ignore[misc]
        told.append(f"{name} {call:.1f} µs the call, {whole:.1f} µs until it is there")
    cuda.call("cudaFreeHost", locked)
    return "; ".join(told)


def _page_locked(device: _Device) -> str:
    told = []
    for nbytes in (4 << 10, 1 << 20):
        held: list[int] = []
        make = _times(lambda: held.append(int(device.cuda.call("cudaMallocHost", nbytes))))  # noqa: B023
        free = _times(lambda: device.cuda.call("cudaFreeHost", held.pop()))  # noqa: B023
        told.append(f"{nbytes >> 10} KiB: {make:.0f} µs to make, {free:.0f} µs to free")
    return "; ".join(told)


def _graph_times(device: _Device, nodes: int) -> str:
    cuda, memory = device.cuda, Memory(device.cuda, 4096)

    def record(value: int) -> Any:
        mode = device.api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        cuda.call("cudaStreamBeginCapture", device.stream, mode)
        for _ in range(nodes):
            cuda.call("cudaMemsetAsync", memory.address, value, 4096, device.stream)
        return cuda.call("cudaStreamEndCapture", device.stream)

    begin = time.perf_counter()
    graph, other = record(1), record(2)
    recorded = (time.perf_counter() - begin) / 2 * 1e6
    begin = time.perf_counter()
    made = cuda.call("cudaGraphInstantiate", graph, 0)
    instantiated = (time.perf_counter() - begin) * 1e6
    begin = time.perf_counter()
    status = device.api.cudaGraphExecUpdate(made, other)[0]
    updated = f"{(time.perf_counter() - begin) * 1e6:.0f} µs" if not int(status) else device.name(status)
    launched = _times(lambda: cuda.call("cudaGraphLaunch", made, device.stream), cuda.wait)
    for name, handle in (("cudaGraphExecDestroy", made), ("cudaGraphDestroy", graph), ("cudaGraphDestroy", other)):
        cuda.call(name, handle)
    times = f"record {recorded:.0f} µs, instantiate {instantiated:.0f} µs, update {updated}, launch {launched:.0f} µs"
    return f"{times}, right" if (device.bytes_at(memory.address, 4096) == 2).all() else f"{times}, not updated"


def _onnxruntime(device: _Device) -> str:
    backend, before = OnnxRuntimeCuda(), device.cuda.free_memory()
    held = backend.allocate((64 << 20,), "uint8")
    taken_now = (before - device.cuda.free_memory()) / 2**20
    del held
    return f"{taken_now:.0f} MiB taken, {(before - device.cuda.free_memory()) / 2**20:.0f} MiB kept"


def _top(device: _Device) -> str:
    import torch

    logits = torch.randn(150_000, device="cuda")
    host = torch.empty(150_000).pin_memory()

    def top() -> None:
        torch.topk(logits, 64)
        torch.cuda.synchronize()

    def copied() -> None:
        host.copy_(logits, non_blocking=True)
        torch.cuda.synchronize()

    return f"{_times(top):.0f} µs; all of them copied: {_times(copied):.0f} µs"
