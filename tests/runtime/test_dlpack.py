"""DLPack on a stand-in for CUDA: capsules made by hand, whose owner counts what it gave and got back."""

import ctypes
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.runtime.arrays import in_cuda_memory, on_host
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.cuda import Cuda, Memory, Pinned
from mllm_edge.runtime.backends.cuda_arrays import CudaArray, taken
from mllm_edge.runtime.vlm import VLM
from tests.runtime.tensorrt_stand_in import StandIn

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
INT, FLOAT, BFLOAT, BOOL = 0, 2, 4, 6
STREAM = 77

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    """DLManagedTensor, one field after the other as dlpack.h has them."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", _DELETER),
    )


class Lent:
    """An array of a library that knows nothing but DLPack. `returned` counts how often its deleter was called."""

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        device: tuple[int, int] = (CUDA, 0),
        dtype: tuple[int, int, int] = (FLOAT, 16, 1),
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ):
        self._device, self.returned = device, 0
        self.streams: list[Any] = []
        self.capsules: list[Any] = []
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        code, bits, lanes = dtype
        self._managed = Managed(
            data=address,
            device_type=device[0],
            device_id=device[1],
            ndim=len(shape),
            dtype=(ctypes.c_uint8 * 4)(code, bits, lanes & 0xFF, lanes >> 8),
            shape=ctypes.addressof(self._shape),
            strides=None if self._strides is None else ctypes.addressof(self._strides),
            byte_offset=offset,
            deleter=_DELETER(self._delete),
        )

    def _delete(self, managed: int) -> None:
        assert managed == ctypes.addressof(self._managed)
        self.returned += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **options: Any) -> Any:
        self.streams.append(options.get("stream"))
        self.capsules.append(_new(ctypes.addressof(self._managed), b"dltensor", None))
        return self.capsules[-1]


@pytest.fixture
def cuda(machine: StandIn) -> Cuda:
    return Cuda()


def values(shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def uploaded(cuda: Cuda, array: np.ndarray, offset: int = 0) -> Memory:
    """A copy on the device, `offset` bytes behind the memory's beginning."""
    memory = Memory(cuda, offset + array.nbytes)
    cuda.upload(memory.address + offset, array)
    return memory


@pytest.mark.parametrize("kind", [CUDA, CUDA_MANAGED])
def test_it_is_used_where_it_lies_and_given_back_once(machine: StandIn, cuda: Cuda, kind: int) -> None:
    expected = values()
    memory = uploaded(cuda, expected)
    lent = Lent(memory.address, expected.shape, (kind, 0))
    before = machine.allocated()
    array = taken(cuda, "x", lent)
    assert isinstance(array, CudaArray)
    assert (array.address, array.shape, array.dtype) == (memory.address, expected.shape, np.float16)
    assert machine.allocated() == before
    assert np.array_equal(array.read(0, 2), expected)
    assert lent.streams == [STREAM]
    assert _valid(lent.capsules[0], b"used_dltensor")
    part = array.part(0, 0, 1) if expected.shape[0] == 1 else array
    del array
    gc.collect()
    assert lent.returned == 0, "a part of it still lives"
    del part
    assert lent.returned == 1


def test_page_locked_memory_is_reached_by_the_device_and_knows_no_stream(machine: StandIn, cuda: Cuda) -> None:
    expected = values()
    pinned = Pinned(cuda, expected.nbytes)
    pinned.bytes[...] = expected.reshape(-1).view(np.uint8)
    lent = Lent(pinned.address, expected.shape, (CUDA_HOST, 0))
    array = taken(cuda, "x", lent)
    assert isinstance(array, CudaArray)
    assert array.address == pinned.address
    assert lent.streams == [None]


@pytest.mark.parametrize("size", [1, 3])
def test_offset_and_strides(cuda: Cuda, size: int) -> None:
    expected = values((size, 3, 4))
    memory = uploaded(cuda, expected, offset=512)
    # Nothing steps along a dimension of one, whatever is said about it; steps are 64 bits wide.
    strides = (12 if size > 1 else 1 << 40, 4, 1)
    lent = Lent(memory.address, expected.shape, strides=strides, offset=512)
    array = taken(cuda, "x", lent)
    assert isinstance(array, CudaArray)
    assert array.address == memory.address + 512
    assert np.array_equal(array.read(0, size), expected)


@pytest.mark.parametrize("strides", [(1, 2, 6), (24, 4, 1), (12, 4, 2), ((1 << 32) + 12, 4, 1)])
def test_other_orders_are_refused_and_given_back(cuda: Cuda, strides: tuple[int, ...]) -> None:
    lent = Lent(uploaded(cuda, values()).address, (2, 3, 4), strides=strides)
    with pytest.raises(BackendError, match="input x is not C-contiguous"):
        taken(cuda, "x", lent)
    gc.collect()
    assert lent.returned == 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [((INT, 64, 1), "int64"), ((1, 8, 1), "uint8"), ((FLOAT, 32, 1), "float32"), ((BOOL, 8, 1), "bool")],
)
def test_types(cuda: Cuda, dtype: tuple[int, int, int], expected: str) -> None:
    array = taken(cuda, "x", Lent(Memory(cuda, 64).address, (4,), dtype=dtype))
    assert array.dtype == np.dtype(expected)


@pytest.mark.parametrize("dtype", [(BFLOAT, 16, 1), (FLOAT, 16, 2), (INT, 4, 1), (FLOAT, 32, 256)])
def test_types_that_numpy_does_not_have(cuda: Cuda, dtype: tuple[int, int, int]) -> None:
    lent = Lent(Memory(cuda, 64).address, (4,), dtype=dtype)
    with pytest.raises(BackendError, match=f"input x has a type .* code {dtype[0]}, {dtype[1]} bits, {dtype[2]} lanes"):
        taken(cuda, "x", lent)
    gc.collect()
    assert lent.returned == 1


def test_another_gpu(cuda: Cuda) -> None:
    lent = Lent(Memory(cuda, 64).address, (4,), (CUDA, 1))
    with pytest.raises(BackendError, match="input x lies on GPU 1"):
        taken(cuda, "x", lent)
    assert not lent.capsules


def test_a_capsule_that_was_taken_already(cuda: Cuda) -> None:
    lent = Lent(Memory(cuda, 64).address, (4,))
    first = taken(cuda, "x", lent)
    used = lent.capsules[0]

    class Again(Lent):
        def __dlpack__(self, **options: Any) -> Any:
            return used

    with pytest.raises(BackendError, match="input x: its __dlpack__ gives no new capsule"):
        taken(cuda, "x", Again(0, (4,)))
    assert lent.returned == 0
    assert isinstance(first, CudaArray)


def test_an_owner_without_a_deleter(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    lent = Lent(Memory(cuda, 64).address, (4,))
    lent._managed.deleter = _DELETER(0)
    array = taken(cuda, "x", lent)
    del array
    assert lent.returned == 0
    assert not problems


def test_host_memory_becomes_an_array(cuda: Cuda) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for value, expected in ((tensor, tensor.numpy()), (tensor.T, tensor.numpy().T)):
        array = taken(cuda, "x", value)
        assert isinstance(array, np.ndarray)
        assert array.flags.c_contiguous
        assert np.array_equal(array, expected)
    shared = on_host(tensor)
    tensor[0, 0] = 99
    assert shared[0, 0] == 99

    class Plain:
        """Nothing but DLPack."""

        def __dlpack__(self, **options: Any) -> Any:
            return tensor.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return CPU, 0

    assert not in_cuda_memory(Plain())
    assert on_host(Plain(), np.float16).dtype == np.float16
    assert np.array_equal(taken(cuda, "x", Plain()), tensor.numpy())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CUDA, CUDA_HOST])
@pytest.mark.parametrize("offset", [0, 512, 2])
def test_a_component_reads_it_where_it_lies(machine: StandIn, bundle: Path, kind: int, offset: int) -> None:
    """At an odd address TensorRT gets a copy, made on the device."""
    pixels = values((2, 3, 64, 64))
    with VLM.load(bundle, backend="tensorrt", notice=lambda text: None) as vlm:
        expected = vlm.component("vision_encoder", {"pixel_values": pixels})["vision_hidden"]
        vlm.component("vision_encoder", {"pixel_values": torch.from_numpy(pixels)})
        cuda = Cuda()
        if kind == CUDA:
            memory = uploaded(cuda, pixels, offset)
            address = memory.address
        else:
            pinned = Pinned(cuda, 512 + offset + pixels.nbytes)
            address = pinned.address + -pinned.address % 256
            ctypes.memmove(address + offset, pixels.ctypes.data, pixels.nbytes)
        lent = Lent(address, pixels.shape, (kind, 0), offset=offset)
        machine.counts.clear()
        found = vlm.component("vision_encoder", {"pixel_values": lent})["vision_hidden"]
        assert np.array_equal(found, expected)
        assert machine.counts["bytes uploaded"] == 0
        assert machine.counts["bytes copied on the device"] == (pixels.nbytes if offset % 256 else 0)
        assert lent.returned == 0, "what is fed stays bound"
        other = vlm.component("vision_encoder", {"pixel_values": -pixels})["vision_hidden"]
        assert lent.returned == 1
        assert not np.array_equal(other, expected)


def test_a_type_that_is_not_the_graphs(machine: StandIn, bundle: Path) -> None:
    opened = Bundle.load(bundle)
    variant = opened.variant("vision_encoder", "tensorrt")
    session = open_backend("tensorrt").open(opened.listed(variant.file), variant)
    lent = Lent(Memory(Cuda(), 4).address, (1, 3, 64, 64), dtype=(FLOAT, 32, 1))
    with pytest.raises(BackendError, match="pixel_values is float32, not float16"):
        session.run({"pixel_values": lent})  # type: ignore[dict-item]
    gc.collect()
    assert lent.returned == 1
