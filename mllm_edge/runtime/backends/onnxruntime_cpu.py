"""ONNX Runtime on the processor: the backend that always works."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.runtime.device import physical_cores
from mllm_edge.runtime.huge_pages import huge_pages
from mllm_edge.spec import Variant

__all__ = ["OnnxRuntimeCpu"]

_PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeCpu:
    """Sessions share the process; `threads` (default: physical cores) work inside one operator.

    Another `target` than cpu runs the graphs made for it, where they have only standard operators: right, but several
    times slower. It serves comparisons. `profiles`: a folder where each session, when it is closed, leaves ONNX
    Runtime's profile of its runs, as FILE_TIME.json for the graph in FILE.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, target: str = "cpu", profiles: Path | None = None):
        self._ort, self.target, self._profiles = _import(), target, profiles
        self.threads = threads or physical_cores()

    def open(self, path: Path, variant: Variant) -> "_Session":
        """Open a graph; raises BackendError with ONNX Runtime's own reason."""
        self._check_version(path, variant)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profiles / path.name)
        if variant.kv_mode is None:
            # Threads that wait for work spin, and would take the cores from the component that runs next. Only the
            # decoder, which runs again within microseconds, gains from threads that stay awake between runs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            # Only the decoder reads all its weights for so little arithmetic that page tables matter.
            with huge_pages() if variant.kv_mode is not None else contextlib.nullcontext():
                session = self._ort.InferenceSession(str(path), options, providers=[_PROVIDER])
            return _Session(self._ort, session)
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise BackendError(
                f"{path}: ONNX Runtime {self._ort.__version__} does not open it: {e}",
                "check the bundle with `mllm-edge inspect --verify`, or export it again",
            ) from e

    def allocate(self, shape: tuple[int, ...], dtype: str) -> "_Buffer":
        """Zeroed host memory."""
        return _Buffer(np.zeros(shape, dtype))

    def _check_version(self, path: Path, variant: Variant) -> None:
        minimum = variant.minimum.get("onnxruntime", "0")
        if _version(self._ort.__version__) < _version(minimum):
            raise BackendError(
                f"{path}: needs ONNX Runtime {minimum}, here is {self._ort.__version__}",
                "pip install --upgrade onnxruntime",
            )


class _Buffer:
    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self, axis: int, length: int) -> np.ndarray:
        return self.array[_prefix(axis, length)].copy()

    def write(self, axis: int, values: np.ndarray) -> None:
        self.array[_prefix(axis, values.shape[axis])] = values

    def part(self, axis: int, start: int, stop: int) -> "_Buffer":
        view = self.array[(slice(None),) * axis + (slice(start, stop),)]
        assert view.flags.c_contiguous, "a part must be contiguous"
        return _Buffer(view)


class _Session:
    """Everything goes through one IO binding: buffers stay bound, arrays are rebound at each run without a copy."""

    limits: Mapping[str, int] = {}

    def __init__(self, ort: Any, session: Any):
        self._ort, self._session = ort, session
        self._binding = session.io_binding()
        self._outputs = [output.name for output in session.get_outputs()]
        self._bound_outputs: set[str] = set()
        self._kept: dict[str, Any] = {}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(name, value))
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, self._value(name, value))
            self._bound_outputs.add(name)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, self._value(name, array))
        free = [name for name in self._outputs if name not in self._bound_outputs]
        for name in free:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise BackendError(f"ONNX Runtime failed to run the graph: {e}") from e
        values = dict(zip(self._outputs, self._binding.get_outputs(), strict=False)) if free else {}
        return {name: values[name].numpy() for name in free}

    def _value(self, name: str, value: Any) -> Any:
        array = value.array if isinstance(value, _Buffer) else np.asarray(value, order="C")
        # The OrtValue borrows the array's memory: keep the array alive as long as it is bound.
        self._kept[name] = array
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _prefix(axis: int, length: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(length),)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise BackendError(f"ONNX Runtime is not installed ({e})", 'pip install "mllm-edge[cpu]"') from e
    return onnxruntime


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
