"""Arrays in CUDA memory: a backend's own, and those of other libraries, used where they lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.arrays import in_cuda_memory, on_host
from mllm_edge.runtime.backends.cuda import Cuda, Memory
from mllm_edge.runtime.backends.dlpack import Borrowed

__all__ = ["ALIGNMENT", "CudaArray", "taken"]

# What TensorRT demands of every address.
ALIGNMENT = 256
# Since this version `__cuda_array_interface__` tells the stream of the last work on it, and None says: it is done.
_TELLS_STREAM = 3


@dataclass(frozen=True)
class CudaArray:
    """Device memory, or a contiguous part of it. `owner`: what must stay for the memory to stay."""

    cuda: Cuda
    owner: Any
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether TensorRT takes the address."""
        return self.address % ALIGNMENT == 0

    @property
    def room(self) -> int:
        """Bytes from where it begins to the end of the memory that it is a part of; of foreign memory its own."""
        mine = isinstance(self.owner, Memory)
        return self.owner.address + self.owner.nbytes - self.address if mine else self.nbytes

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
        return CudaArray(self.cuda, self.owner, address, shape, self.dtype)

    def _runs(self, axis: int) -> list[tuple[tuple[int, ...], int]]:
        """Index and address of each piece that is contiguous from `axis` on."""
        step = math.prod(self.shape[axis:]) * self.dtype.itemsize
        return [(index, self.address + i * step) for i, index in enumerate(np.ndindex(self.shape[:axis]))]


def taken(cuda: Cuda, name: str, value: Any) -> CudaArray | np.ndarray:
    """The value of an input: where it lies when that is CUDA memory, by DLPack or else `__cuda_array_interface__`;
    any other as a C-contiguous array. What its owner has enqueued so far comes before what we enqueue from now on.

    Raises BackendError for CUDA memory that is not C-contiguous.
    """
    if isinstance(value, CudaArray):
        return value
    if not in_cuda_memory(value):
        return on_host(value)
    if hasattr(value, "__dlpack__"):
        borrowed = Borrowed(name, value, cuda.stream)
        array = CudaArray(cuda, borrowed, borrowed.address, borrowed.shape, borrowed.dtype)
        strides = borrowed.strides
    else:
        interface = value.__cuda_array_interface__
        dtype = np.dtype(interface["typestr"])
        array = CudaArray(cuda, value, interface["data"][0], tuple(interface["shape"]), dtype)
        strides = interface.get("strides")
        stream = interface.get("stream")
        if stream is not None or interface.get("version", 0) < _TELLS_STREAM:
            cuda.order(stream)
    if strides is not None and not _contiguous(array, strides):
        raise BackendError(f"input {name} is not C-contiguous", "make it contiguous first")
    return array


def _contiguous(array: CudaArray, strides: Sequence[int]) -> bool:
    """Whether values follow each other; nothing steps along a dimension of one."""
    step = array.dtype.itemsize
    for size, stride in zip(reversed(array.shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
