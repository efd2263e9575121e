"""ONNX Runtime on the CPU: the backend that always works."""

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import BackendError
from mllm_edge.install import install_hint
from mllm_edge.runtime.backends.installed import version_numbers
from mllm_edge.runtime.foreign import pass_on
from mllm_edge.runtime.log import logger
from mllm_edge.runtime.machine.huge_pages import huge_pages
from mllm_edge.runtime.machine.threads import Threads
from mllm_edge.spec import Variant

__all__ = ["OnnxRuntimeCpu", "import_onnxruntime", "open_graph", "run_bound"]

_PROVIDER = "CPUExecutionProvider"
_MAPPED, _HUGE = 256 << 10, 4 << 20  # bytes


class OnnxRuntimeCpu:
    """Sessions share the process; `threads` (default: as many as there are physical cores) work inside one operator.

    Another `target` than cpu runs the graphs made for it: right, but several times slower. It serves comparisons.
    `profiles`: a folder where each session, when it is closed, leaves ONNX Runtime's profile of its runs, as
    FILE_TIME.json for the graph in FILE.
    """

    name = "cpu"
    grows = True  # a cache's buffers may be others from one run to the next

    def __init__(self, threads: int | Threads | None = None, target: str = "cpu", profiles: Path | None = None):
        self._threads = threads if isinstance(threads, Threads) else Threads.of(threads)
        self._ort, self.target = import_onnxruntime(), target
        self._profiles = profiles
        self.threads = self._threads.count

    def open(self, path: Path, variant: Variant) -> "_Session":
        """Open a graph; raises BackendError with ONNX Runtime's own reason."""
        options = self._ort.SessionOptions()
        stepping = variant.kv_mode is not None
        threads = self._threads.for_graph(stepping, _weights(path))
        options.intra_op_num_threads = threads.count
        # A pattern takes a second time what the first run of a shape took, for a µs or two of a run.
        options.enable_mem_pattern = False
        for key, value in threads.settings(stepping, version_numbers(self._ort.__version__)).items():
            options.add_session_config_entry(key, value)
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profiles / path.name)
        # Only the decoder reads all its weights for so little arithmetic that page tables matter.
        with huge_pages() if stepping else contextlib.nullcontext():
            return _Session(self._ort, open_graph(self._ort, path, variant, options, [_PROVIDER]))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> "_Buffer":
        """Zeroed host memory."""
        return _Buffer(_zeros(shape, dtype))


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Large arrays have memory of their own, which goes back to the system with them: of what a cache frees as it
    grows, the heap would keep most. They get huge pages from the size on from which numpy asks for such."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < _MAPPED:
        return np.zeros(shape, dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes, **private)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


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
        self._bound: dict[str, bool] = {}
        self._kept: dict[str, Any] = {}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(name, value))
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, self._value(name, value))
            self._bound[name] = True

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, self._value(name, array))
        return run_bound(self._session, self._binding, self._outputs, self._bound)

    def _value(self, name: str, value: Any) -> Any:
        array = value.array if isinstance(value, _Buffer) else np.asarray(value, order="C")
        # The OrtValue borrows the array's memory: keep the array alive as long as it is bound.
        self._kept[name] = array
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _weights(path: Path) -> int:
    """Bytes of a graph's file and of the one beside it that holds its weights."""
    files = (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _prefix(axis: int, length: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(length),)


def import_onnxruntime(install: str = "") -> Any:
    """ONNX Runtime's module; raises BackendError with the command that installs it, that for the CPU where none is
    told."""
    try:
        import onnxruntime
    except ImportError as e:
        pass_on(e)
        raise BackendError(f"ONNX Runtime is not installed ({e})", install or install_hint("cpu")) from e
    if logger.level:  # whoever has set it wants to hear of this package what it says, and not its engine's chatter
        onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def open_graph(ort: Any, path: Path, variant: Variant, options: Any, providers: Sequence[Any]) -> Any:
    """ONNX Runtime's session of a graph; raises BackendError when it is too old, or with its own reason."""
    minimum = variant.minimum.get("onnxruntime", "0")
    if version_numbers(ort.__version__) < version_numbers(minimum):
        raise BackendError(
            f"{path}: needs ONNX Runtime {minimum}, here is {ort.__version__}",
            "pip install --upgrade onnxruntime",
        )
    options.log_severity_level = 4  # what fails is raised, and its coloured lines on standard error say no more
    # Of products of static shape it makes Gemm, and moves Q/DQ before them with types that opset 21 and later refuse.
    disabled = ["MatMulAddFusion"] if variant.dialect == "opset24" else None
    try:
        return ort.InferenceSession(str(path), options, providers=providers, disabled_optimizers=disabled)
    except Exception as e:  # onnxruntime's exceptions share no base class
        pass_on(e)
        raise BackendError(
            f"{path}: ONNX Runtime {ort.__version__} does not open it: {e}",
            "check the bundle with `mllm-edge inspect --verify`, or export it again",
        ) from e


def run_bound(session: Any, binding: Any, outputs: Sequence[str], bound: dict[str, bool]) -> dict[str, np.ndarray]:
    """Run what is bound; of `outputs` those that the caller has not bound come as new arrays.

    `bound`: the outputs in the order in which they were bound first, which is that of the binding's values, and
    whether the caller bound them; the others are added here.
    """
    free = [name for name in outputs if not bound.get(name)]
    for name in free:
        binding.bind_output(name, "cpu")
        bound[name] = False
    try:
        session.run_with_iobinding(binding)
    except Exception as e:  # onnxruntime's exceptions share no base class
        pass_on(e)
        raise BackendError(f"ONNX Runtime failed to run the graph: {e}") from e
    values = dict(zip(bound, binding.get_outputs(), strict=True)) if free else {}
    return {name: values[name].numpy() for name in free}
