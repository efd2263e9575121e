"""Scales that every runtime takes: never zero, and normal numbers of the type they are stored in.

TensorRT refuses a DequantizeLinear whose scale is not positive; a scale that half precision can only hold as a
subnormal number is rounded coarsely, or flushed to zero. Rows of zeros (pruned heads, padded vocabularies, layers that
start at zero) and rows of tiny values have such scales.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

__all__ = ["reciprocal", "smallest", "storable"]

_TINY = float(np.finfo(np.float32).smallest_normal)
# Products with a scale of activations are still normal numbers: others are slow. Larger would not do: kernels that
# subtract zero points behind the sum leave a rounding error, which is multiplied with the scale.
_LEAST = 2.0**-60


def reciprocal(scales: np.ndarray) -> np.ndarray:
    """1 / scales, 0 where that would be no number."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=np.abs(scales) >= _TINY)


def smallest(dtype: np.dtype) -> float:
    """The smallest scale that is stored in `dtype`."""
    return max(float(ml_dtypes.finfo(dtype).smallest_normal), _LEAST)


def storable(
    codes: np.ndarray,
    scales: np.ndarray,
    dtype: np.dtype,
    zero: int = 0,
    exact: Callable[[], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [*S, k] around `zero` and scales [*S] that can be stored in `dtype`: `smallest` in the place of less, and
    of 0, where all codes are `zero`. There the values are rounded anew, those that `exact` returns [*S, k], or (None)
    what the codes stood for."""
    floor = smallest(dtype)
    weak = ~(np.abs(scales) >= floor)
    if not weak.any():
        return codes, scales
    old = scales[weak]
    new = np.where(old < 0, -floor, floor).astype(scales.dtype)
    if exact is None:
        wanted = (codes[weak].astype(np.float32) - zero) * (old / new)[:, None]
    else:
        wanted = exact()[weak] / new[:, None]
    scales, codes = scales.copy(), codes.copy()
    scales[weak] = new
    codes[weak] = (np.rint(wanted) if np.issubdtype(codes.dtype, np.integer) else wanted) + zero
    return codes, scales
