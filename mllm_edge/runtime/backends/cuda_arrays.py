"""Arrays in CUDA memory: a backend's own, and those of other libraries, used where they lie."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.backends.cuda import Cuda, Memory

__all__ = ["CudaArray", "lent"]

# What TensorRT demands of every address.
_ALIGNMENT = 256
# The stream of `__cuda_array_interface__` that CUDA's other streams wait for.
_LEGACY_STREAM = 1


@dataclass(frozen=True)
class CudaArray:
    """Device memory, or a contiguous part of it."""

    cuda: Cuda
    memory: Memory | None
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether TensorRT takes the address."""
        return self.address % _ALIGNMENT == 0

    def read(self, axis: int, length: int) -> np.ndarray:
        values = np.empty((*self.shape[:axis], length, *self.shape[axis + 1 :]), self.dtype)
        for index, address in self._runs(axis):
            self.cuda.download(values[index], address)
        self.cuda.wait()
        return values

    def write(self, axis: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        for index, address in self._runs(axis):
            self.cuda.upload(address, values[index])

    def part(self, axis: int, start: int, stop: int) -> "CudaArray":
        assert math.prod(self.shape[:axis]) == 1, "a part must be contiguous"
        address = self.address + start * math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return CudaArray(self.cuda, self.memory, address, shape, self.dtype)

    def _runs(self, axis: int) -> list[tuple[tuple[int, ...], int]]:
        """Index and address of each piece that is contiguous from `axis` on."""
        step = math.prod(self.shape[axis:]) * self.dtype.itemsize
        return [(index, self.address + i * step) for i, index in enumerate(np.ndindex(self.shape[:axis]))]


def lent(cuda: Cuda, name: str, interface: Mapping[str, Any]) -> CudaArray:
    """An array of another library in CUDA memory, by `__cuda_array_interface__`; its owner keeps it alive."""
    buffer = CudaArray(cuda, None, interface["data"][0], tuple(interface["shape"]), np.dtype(interface["typestr"]))
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != np.empty(buffer.shape, buffer.dtype).strides:
        raise BackendError(f"input {name} is not C-contiguous", "make it contiguous first")
    stream = interface.get("stream")
    if stream not in (None, _LEGACY_STREAM):  # with which ours keeps order by itself
        cuda.call("cudaStreamSynchronize", stream)
    return buffer
