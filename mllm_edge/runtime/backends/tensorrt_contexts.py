"""Execution contexts. TensorRT for RTX compiles kernels when they first run, and keeps them beside the engine."""

import contextlib
import weakref
from pathlib import Path
from typing import Any

from mllm_edge.files import write_whole

__all__ = ["Contexts"]


class Contexts:
    """Makes the contexts of one engine, for memory that the caller gives them.

    `path`: the file for compiled kernels. It is read now, where TensorRT for RTX accepts what is there, and written by
    `keep` and when this object goes, if there are new ones. `graphs`: TensorRT for RTX records runs as CUDA graphs
    itself, once it has compiled their kernels.
    """

    def __init__(self, trt: Any, engine: Any, path: Path, graphs: bool):
        self._engine, self._how = engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels: _Kernels | None = None
        # It compiles better kernels while the first ones run, and records runs itself: a graph recorded from outside
        # would keep those first ones.
        self.compiles = hasattr(trt, "IRuntimeCache")
        if not self.compiles:
            return
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(self._how)
        if graphs and hasattr(trt, "CudaGraphStrategy"):
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        runtime_cache = runtime_config.create_runtime_cache()
        known = path.read_bytes() if path.is_file() else b""
        # Another driver's, or damaged: refused, and written anew.
        known = known if known and runtime_cache.deserialize(known) else b""
        runtime_config.set_runtime_cache(runtime_cache)
        self._how = runtime_config
        self._kernels = _Kernels(runtime_cache, known, path)
        # Not at the interpreter's exit: the driver may be gone by then.
        weakref.finalize(self, self._kernels.keep).atexit = False

    def make(self) -> Any:
        """A context, None when TensorRT makes none."""
        return self._engine.create_execution_context(self._how)

    def keep(self) -> None:
        """Write the kernels that were compiled since."""
        if self._kernels is not None:
            self._kernels.keep()


class _Kernels:
    def __init__(self, runtime_cache: Any, known: bytes, path: Path):
        self._runtime_cache, self._known, self._path = runtime_cache, known, path

    def keep(self) -> None:
        data = bytes(self._runtime_cache.serialize())
        if data == self._known:
            return
        with contextlib.suppress(OSError):  # a bundle that cannot be written works without
            write_whole(self._path, data, durable=False)
            self._known = data
