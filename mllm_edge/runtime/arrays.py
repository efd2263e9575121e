"""Arrays of other libraries: those in host memory become numpy's, those in CUDA memory stay what they are."""

from typing import Any

import numpy as np

__all__ = ["in_cuda_memory", "on_host"]

# DLPack's device types of memory that a GPU reaches: its own, page-locked on the host, managed.
_CUDA = (2, 3, 13)


def in_cuda_memory(value: Any) -> bool:
    """Whether it says so itself, by `__cuda_array_interface__` or `__dlpack_device__`."""
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] in _CUDA


def on_host(value: Any, dtype: Any = None) -> np.ndarray:
    """A C-contiguous array of it, over the same memory where type and order allow that; by DLPack if it has that.
    Numpy makes it read-only where the library speaks a DLPack that does not tell whether it may be written.

    Raises what numpy raises when it cannot take it.
    """
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        value = np.from_dlpack(value)
    return np.asarray(value, dtype, order="C")
