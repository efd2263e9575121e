"""A stand-in for the part of CUDA that the backends use: nothing happens at a call, everything when it is waited for.

Memory is what the stand-in hands out, and every access to it is checked. Work is queued by stream and done when a
stream is waited for, or when another one has to wait for it; until then what it writes is not there. Freed memory is
handed out again. While a stream records a graph, what the real ones refuse is refused.
"""

import ctypes
import enum
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["BAD_ADDRESS", "CudaStandIn", "Stream", "cudart"]

BAD_ADDRESS, _NO_MEMORY, _CAPTURING, _IMPLICIT, _NO_DRIVER = 700, 2, 900, 906, 35
_CANNOT_UPDATE = 910
_NAMES = {
    BAD_ADDRESS: b"cudaErrorIllegalAddress",
    _NO_MEMORY: b"cudaErrorMemoryAllocation",
    _CAPTURING: b"cudaErrorStreamCaptureUnsupported",
    _IMPLICIT: b"cudaErrorStreamCaptureImplicit",
    _NO_DRIVER: b"cudaErrorInsufficientDriver",
    _CANNOT_UPDATE: b"cudaErrorGraphExecUpdateFailure",
}
_ALIGNMENT = 256
_LEGACY, _FIRST, _NON_BLOCKING = 1, 77, 1
_UP, _DOWN, _BETWEEN = 1, 2, 4
_COUNTS = {_UP: "bytes uploaded", _DOWN: "bytes downloaded", _BETWEEN: "bytes copied on the device"}
# What a piece of work returns: CUDA's status.
Work = Callable[[], int]


@dataclass
class Stream:
    """Work in order. `blocking`: it and the legacy stream wait for each other. `captured`: what a graph gets."""

    blocking: bool
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None


class CudaStandIn:
    """The made-up GPU. `counts`: records (graphs instantiated), updates, replays, page-locked allocations, waits and
    bytes; `trouble`: a number to return from a CUDA function, by name; `late`: copies read pageable memory when the
    stream comes to them, as some devices do, not at the call; `executes`: whether anything is copied at all;
    `updates`: whether a graph can become another one; `status`: of the first work that failed, which every wait
    returns from then on; `model`: the GPU's name and its number of multiprocessors."""

    def __init__(self, capability: tuple[int, int], gpus: int = 1) -> None:
        self.capability, self.gpus = capability, gpus
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.freed: dict[int, list[np.ndarray]] = {}
        self.free, self.total = 8 << 30, 16 << 30  # other processes have the difference
        self.counts: Counter[str] = Counter()
        self.trouble: dict[str, int] = {}
        self.streams = {_LEGACY: Stream(True)}
        self.late = self.executes = self.updates = True
        self.status = 0
        self.model = ("Orin", 16)

    def view(self, address: int, nbytes: int) -> np.ndarray | None:
        """Memory that the device reaches, as bytes; None where it is not all of one allocation."""
        for begin, memory in (*self.memory.items(), *self.pinned.items()):
            if begin <= address and address + nbytes <= begin + len(memory):
                return memory[address - begin : address - begin + nbytes]
        return None

    def allocated(self) -> int:
        return sum(len(memory) for memory in self.memory.values())

    def stream(self, handle: int) -> Stream:
        """By its handle, 0 being the legacy stream."""
        return self.streams[int(handle) or _LEGACY]

    def new_stream(self, blocking: bool) -> int:
        handle = _FIRST + len(self.streams) - 1
        self.streams[handle] = Stream(blocking)
        return handle

    def enqueue(self, handle: int, work: Work) -> int:
        """Put work on a stream, or into the graph that it records."""
        stream, legacy = self.stream(handle), self.streams[_LEGACY]
        if stream.captured is not None:
            stream.captured.append(work)
            return 0
        others = [s for s in self.streams.values() if s is not legacy and s.blocking]
        if stream is legacy:
            if any(other.captured is not None for other in others):
                return _IMPLICIT
            for other in others:
                self.order(stream, other)
        elif stream.blocking:
            self.order(stream, legacy)
        stream.queue.append(work)
        return 0

    def order(self, stream: Stream, other: Stream) -> None:
        """What is on a stream from now on comes behind what is on the other one now."""
        pending = list(other.queue)

        def wait() -> int:
            while other.queue and other.queue[0] in pending:
                self._next(other)
            return 0

        if pending:
            stream.queue.append(wait)

    def synchronize(self, handle: int | None = None) -> int:
        """Do what is on a stream, or on all; the first error that there ever was."""
        for stream in list(self.streams.values()) if handle is None else [self.stream(handle)]:
            while stream.queue:
                self._next(stream)
        return self.status

    def _next(self, stream: Stream) -> None:
        status = stream.queue.pop(0)()
        self.status = self.status or status


def cudart(machine: CudaStandIn) -> ModuleType:
    """The bindings of its runtime."""
    api = ModuleType("cuda.bindings.runtime")
    calls = _Calls(machine)
    for name in [n for n in dir(calls) if n.startswith("cuda")]:
        setattr(api, name, _troubled(machine, name, getattr(calls, name)))
    kinds = {"cudaMemcpyHostToDevice": _UP, "cudaMemcpyDeviceToHost": _DOWN, "cudaMemcpyDefault": _BETWEEN}
    api.cudaMemcpyKind = enum.IntEnum("Kind", kinds)  # type: ignore[attr-defined]
    api.cudaStreamCaptureMode = enum.IntEnum("Mode", {"cudaStreamCaptureModeRelaxed": 2})  # type: ignore[attr-defined]
    names = {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    api.cudaDeviceAttr = enum.IntEnum("Attribute", names)  # type: ignore[attr-defined]
    api.cudaStreamNonBlocking = _NON_BLOCKING  # type: ignore[attr-defined]
    return api


def _troubled(machine: CudaStandIn, name: str, function: Callable[..., tuple]) -> Callable[..., tuple]:
    def call(*arguments: Any) -> tuple:
        if name in machine.trouble:
            return machine.trouble[name], None
        return function(*arguments)

    return call


class _Calls:
    """The runtime's functions: a status first, then what they return."""

    def __init__(self, machine: CudaStandIn):
        self._machine = machine

    def cudaGetDeviceCount(self) -> tuple:
        return (0, self._machine.gpus) if self._machine.gpus else (_NO_DRIVER, None)

    def cudaSetDevice(self, device: int) -> tuple:
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple:
        return 0, self._machine.capability[attribute - 75]

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        if not self._machine.gpus:
            return _NO_DRIVER, None
        name, multiprocessors = self._machine.model
        return 0, SimpleNamespace(name=name.encode().ljust(256, b"\0"), multiProcessorCount=multiprocessors)

    def cudaGetErrorName(self, status: int) -> tuple:
        return 0, _NAMES[status]

    def cudaStreamCreate(self) -> tuple:
        return 0, self._machine.new_stream(blocking=True)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        return 0, self._machine.new_stream(blocking=flags != _NON_BLOCKING)

    def cudaStreamDestroy(self, stream: int) -> tuple:
        """What is on it is done all the same."""
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        self._machine.counts[f"waits for stream {stream}"] += 1
        if self._machine.stream(stream).captured is not None:
            return (_CAPTURING,)
        return (self._machine.synchronize(stream),)

    def cudaDeviceSynchronize(self) -> tuple:
        self._machine.counts["waits for all"] += 1
        if any(stream.captured is not None for stream in self._machine.streams.values()):
            return (_CAPTURING,)
        return (self._machine.synchronize(),)

    def cudaMemGetInfo(self) -> tuple:
        return 0, self._machine.free - self._machine.allocated(), self._machine.total

    def cudaMalloc(self, nbytes: int) -> tuple:
        if nbytes <= 0 or nbytes > self._machine.free - self._machine.allocated():
            return _NO_MEMORY, None
        again = self._machine.freed.get(nbytes)
        memory = again.pop() if again else _aligned(nbytes)
        memory[:] = 0xAB  # what was there before
        self._machine.memory[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cudaFree(self, address: int) -> tuple:
        """It waits for all work first."""
        self._machine.synchronize()
        memory = self._machine.memory.pop(address)
        self._machine.freed.setdefault(len(memory), []).append(memory)
        return (0,)

    def cudaMallocHost(self, nbytes: int) -> tuple:
        self._machine.counts["page-locked allocations"] += 1
        memory = _aligned(nbytes)
        self._machine.pinned[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple:
        self._machine.synchronize()
        self._machine.pinned.pop(address)
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple:
        if self._machine.view(address, nbytes) is None:
            return (BAD_ADDRESS,)

        def clear() -> int:
            memory = self._machine.view(address, nbytes)
            if memory is None:
                return BAD_ADDRESS
            memory[:] = value
            return 0

        return (self._machine.enqueue(stream, clear),)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple:
        machine = self._machine
        if machine.stream(stream).captured is not None:
            return (_CAPTURING,)
        if not machine.executes:
            return (0,)
        device = {_UP: [target], _DOWN: [source], _BETWEEN: [target, source]}[kind]
        if any(machine.view(address, nbytes) is None for address in device):
            return (BAD_ADDRESS,)
        machine.counts[_COUNTS[kind]] += nbytes
        pageable = kind == _UP and machine.view(source, nbytes) is None
        known = ctypes.string_at(source, nbytes) if pageable and not machine.late else None

        def copy() -> int:
            if any(machine.view(address, nbytes) is None for address in device):
                return BAD_ADDRESS
            if not pageable:
                ctypes.memmove(target, source, nbytes)
                return 0
            data = _read(source, nbytes) if known is None else known
            ctypes.memmove(target, data, len(data))
            return 0 if len(data) == nbytes else BAD_ADDRESS

        return (machine.enqueue(stream, copy),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self._machine.stream(stream).captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        found = self._machine.stream(stream)
        recorded, found.captured = found.captured, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: list, flags: int) -> tuple:
        self._machine.counts["records"] += 1
        return 0, list(graph)

    def cudaGraphExecUpdate(self, graph: list, other: list) -> tuple:
        if not self._machine.updates or len(graph) != len(other):
            return _CANNOT_UPDATE, None
        self._machine.counts["updates"] += 1
        graph[:] = other
        return 0, None

    def cudaGraphLaunch(self, graph: list, stream: int) -> tuple:
        self._machine.counts["replays"] += 1
        recorded = list(graph)
        return (self._machine.enqueue(stream, lambda: next(filter(None, (work() for work in recorded)), 0)),)

    def cudaGraphDestroy(self, graph: list) -> tuple:
        return (0,)

    def cudaGraphExecDestroy(self, graph: list) -> tuple:
        graph.clear()
        return (0,)


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % _ALIGNMENT :][:nbytes]


def _read(address: int, nbytes: int) -> bytes:
    """This process's memory, or nothing where there is none any more."""
    try:
        file = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return ctypes.string_at(address, nbytes)
    try:
        return os.pread(file, nbytes, address)
    except OSError:
        return b""
    finally:
        os.close(file)
