"""What a piece of a graph passes to the next, run by run, on disk. Several runs share a file: opening one of each run's
own took longer than running the piece."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mllm_edge.calibration.findings import save_arrays

__all__ = ["PassingReader", "PassingWriter"]

_FILE_BYTES = 16 << 20
_SHAPES = "shapes of "


class PassingWriter:
    """Takes one run after another. Files are called `{prefix}-{first run in it}.npz`."""

    def __init__(self, folder: Path, prefix: str):
        self.files: list[Path] = []
        self._folder, self._prefix = folder, prefix
        self._runs: list[Mapping[str, np.ndarray]] = []
        self._first = self._nbytes = 0

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """The next run's; all runs have the same names, or none."""
        if values:
            self._runs.append(values)
        self._nbytes += sum(array.nbytes for array in values.values())
        if self._nbytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._runs:
            return
        path = self._folder / f"{self._prefix}-{self._first}.npz"
        arrays = {}
        for name in self._runs[0]:
            own = [values[name] for values in self._runs]
            arrays[name] = np.concatenate([array.ravel() for array in own])
            arrays[_SHAPES + name] = np.array([array.shape for array in own], np.int64)
        save_arrays(path, arrays, durable=False)
        self.files.append(path)
        self._first, self._runs, self._nbytes = self._first + len(self._runs), [], 0


class PassingReader:
    """Reads what a writer left in `files`; quick for runs in their order, for one file is in memory at a time."""

    def __init__(self, files: Iterable[Path]):
        self._files = {int(path.stem.rpartition("-")[2]): path for path in files}
        self._first, self._runs = -1, []  # type: int, list[dict[str, np.ndarray]]

    def read(self, run: int) -> dict[str, np.ndarray]:
        """By name; nothing where nothing was passed."""
        first = max((first for first in self._files if first <= run), default=-1)
        if first < 0:
            return {}
        if first != self._first:
            self._runs = []  # before the next ones take room, too
            self._runs, self._first = _read(self._files[first]), first
        return dict(self._runs[run - first])


def _read(path: Path) -> list[dict[str, np.ndarray]]:
    with np.load(path) as data:
        arrays = dict(data)
    names = [name for name in arrays if not name.startswith(_SHAPES)]
    values = {name: _parts(arrays[name], arrays[_SHAPES + name]) for name in names}
    return [dict(zip(names, parts, strict=True)) for parts in zip(*values.values(), strict=True)]


def _parts(flat: np.ndarray, shapes: np.ndarray) -> list[np.ndarray]:
    """The arrays [*shape] that lie one behind another in `flat`."""
    parts = np.split(flat, np.cumsum(shapes.prod(axis=1))[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
