"""DLPack: arrays of other libraries where they lie, without any of those libraries.

The records are those that `__dlpack__` hands out when no version is asked for, which every library can.
"""

import ctypes
import weakref
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError

__all__ = ["Borrowed"]

# A capsule that was not taken yet, and one that was: its own destructor leaves that one alone.
_NEW, _USED = b"dltensor", b"used_dltensor"
_PAGE_LOCKED = 3
# DLDataTypeCode → numpy's letter of the kind; numpy has no other floats (bfloat, float8) of its own.
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}

_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
# Called with the interpreter's lock held: some owners are Python objects.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    """DLTensor; `strides` in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Borrowed:
    """An array in memory that the first GPU reaches, given back to its owner when this object goes.

    `shape`, `dtype` and `address` as they are; `strides` in bytes, None for C order. `stream` is our CUDA stream: what
    the owner has enqueued comes before what is enqueued there from now on.

    Raises BackendError, which names the input, for another GPU's array or a type that numpy does not have.
    """

    def __init__(self, name: str, value: Any, stream: int):
        kind, device = value.__dlpack_device__()
        if device != 0:
            raise BackendError(f"input {name} lies on GPU {device}, the engine runs on GPU 0", "move it there first")
        # A stream is asked for only where work is enqueued, which for page-locked memory is the host.
        capsule = value.__dlpack__() if kind == _PAGE_LOCKED else value.__dlpack__(stream=stream)
        if not _is_valid(capsule, _NEW):
            raise BackendError(f"input {name}: its __dlpack__ gives no new capsule", "give a fresh array")
        managed = _pointer_of(capsule, _NEW)
        _rename(capsule, _USED)
        weakref.finalize(self, _give_back, managed).atexit = False  # the owner may be gone by then
        tensor = _Managed.from_address(managed).tensor
        self.dtype = _dtype(name, tensor)
        self.shape = tuple(tensor.shape[: tensor.ndim])
        steps = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
        self.strides = None if steps is None else tuple(self.dtype.itemsize * step for step in steps)
        self.address = (tensor.data or 0) + tensor.byte_offset


def _dtype(name: str, tensor: _Tensor) -> np.dtype:
    if tensor.code not in _KINDS or tensor.bits % 8 or tensor.lanes != 1:
        what = f"DLPack code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes"
        raise BackendError(f"input {name} has a type that numpy has not: {what}", "cast it to the graph's type first")
    return np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")


def _give_back(managed: int) -> None:
    deleter = _Managed.from_address(managed).deleter
    if deleter:
        _Deleter(deleter)(managed)
