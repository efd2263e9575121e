"""What calibration found for the layers of a component, as files in a folder."""

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mllm_edge.files import writing_whole
from mllm_edge.graph import rtn
from mllm_edge.graph.precision import Range

__all__ = ["Findings", "LayerFindings", "is_whole", "save_arrays"]

_ARRAYS = ("codes", "scales", "factors", "row_factors")
_NUMBERS = ("bits", "block", "input_range", "error", "nearest_error")


@dataclass(frozen=True, eq=False)
class LayerFindings:
    """What calibration chose for one layer. `codes` [out, in] int8 around zero and `scales` [out, blocks] of the weight
    after `factors` (None: rounded when the graph is written); `input_range` of the input after its factors.

    `row_factors` [out]: what the rows of weight and bias are multiplied by, for the layer behind. Errors are
    ‖ŷ − y‖/‖y‖ of the layer's output, for inputs held apart from all that weights were fitted to (where there were
    enough runs), `nearest_error` that of rounding to nearest as it would be written.
    """

    name: str
    bits: int
    block: int | None
    codes: np.ndarray | None
    scales: np.ndarray | None
    factors: np.ndarray | None
    row_factors: np.ndarray | None
    input_range: Range | None
    error: float
    nearest_error: float

    def replaced(self) -> np.ndarray | None:
        """The weight [out, in] float32 that does what calibration chose with inputs and outputs as they were, without
        factors; None where the weight is rounded when the graph is written."""
        if self.codes is None or self.scales is None:
            return None
        columns = self.codes.shape[1]
        spread = self.scales if self.block is None else np.repeat(self.scales, self.block, axis=1)[:, :columns]
        weight = (self.codes * spread).astype(np.float32)
        weight = weight if self.factors is None else weight / self.factors
        return weight if self.row_factors is None else weight / self.row_factors[:, None]

    def quantize_blocks(
        self, weight: np.ndarray, bits: int, block: int, positive_scales: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `qdq.Rounding`; the codes that were chosen, or rounding to nearest for a form they don't have."""
        if self.codes is None or self.scales is None or (self.bits, self.block) != (bits, block):
            return rtn.quantize_blocks(weight, bits, block, positive_scales)
        if positive_scales and (self.scales < 0).any():  # rounded to nearest, whose scales carry a sign elsewhere
            return rtn.quantize_blocks(weight, bits, block, positive_scales)
        rows, row = self.codes.shape
        padded = np.pad(self.codes, ((0, 0), (0, -row % block))).reshape(rows, -1, block)
        return (padded.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), self.scales

    def quantize_channels(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `qdq.Rounding`."""
        if self.codes is None or self.scales is None or self.block is not None:
            return rtn.quantize_channels(weight)
        return self.codes, self.scales[:, 0]


class Findings:
    """The results for a component, in `folder`; `ignored`: nothing is said about weights, which are rounded then."""

    def __init__(self, folder: Path, ignored: bool = False):
        self.folder, self._ignored = folder, ignored

    def layer(self, name: str) -> LayerFindings | None:
        """What was found for a layer; None where the recipe leaves it to rounding."""
        path = self.folder / f"{name}.npz"
        if self._ignored or not path.is_file():
            return None
        with np.load(path) as data:
            numbers = json.loads(str(data["numbers"]))
            codes, scales, factors, row_factors = (data.get(key) for key in _ARRAYS)
        bits, block, where, error, nearest_error = (numbers[key] for key in _NUMBERS)
        return LayerFindings(
            name=name,
            bits=bits,
            block=block,
            codes=codes,
            scales=scales,
            factors=factors,
            row_factors=row_factors,
            input_range=tuple(where) if where else None,
            error=error,
            nearest_error=nearest_error,
        )

    def tensor_factors(self) -> dict[str, np.ndarray]:
        """Initializers of norms → the factors [K] that they are multiplied by."""
        found = {}
        for path in () if self._ignored else sorted(self.folder.glob("*.fold.npz")):
            with np.load(path) as data:
                found.update({str(name): data["factors"] for name in data["tensors"]})
        return found

    def add(self, found: LayerFindings) -> None:
        """Keep what was found for a layer."""
        numbers = json.dumps({key: getattr(found, key) for key in _NUMBERS})
        arrays = {key: getattr(found, key) for key in _ARRAYS if getattr(found, key) is not None}
        save_arrays(self.folder / f"{found.name}.npz", {"numbers": np.array(numbers), **arrays})

    def add_fold(self, name: str, tensors: Sequence[str], factors: np.ndarray) -> None:
        """Keep that norms' `tensors` are multiplied by `factors` for the group that starts with layer `name`."""
        save_arrays(self.folder / f"{name}.fold.npz", {"tensors": np.array(tensors), "factors": factors})

    def add_cache(self, name: str, peaks: np.ndarray) -> None:
        """Keep the largest magnitudes [heads, D] of a layer's new keys or values, called `present.{layer}.{part}`."""
        save_arrays(self.folder / f"{name}.cache.npz", {"peaks": peaks})

    def cache(self) -> dict[str, np.ndarray]:
        """`present.{layer}.{part}` → the largest magnitudes, where the cache was recorded."""
        found = {}
        for path in self.folder.glob("*.cache.npz"):
            with np.load(path) as data:
                found[path.name.removesuffix(".cache.npz")] = data["peaks"]
        return found

    def errors(self) -> dict[str, tuple[float, float]]:
        """Layer → (its error, the error of rounding to nearest)."""
        others = (".cache", ".fold")
        found = (self.layer(p.stem) for p in sorted(self.folder.glob("*.npz")) if not p.stem.endswith(others))
        return {f.name: (f.error, f.nearest_error) for f in found if f is not None}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], durable: bool = True) -> None:
    """Write an .npz that exists whole or not at all; `durable`: also after a power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_whole(path, sum(array.nbytes for array in arrays.values()), durable) as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def is_whole(path: Path) -> bool:
    """Whether an .npz is there and all of it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    # zipfile's kinds for damage; the last but two where a damaged header names a compression that it does not know.
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False
