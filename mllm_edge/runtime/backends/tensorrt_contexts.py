"""Execution contexts. TensorRT for RTX compiles kernels when they first run, and keeps them beside the engine."""

import contextlib
import weakref
from pathlib import Path
from typing import Any

from mllm_edge.files import write_whole

__all__ = ["Contexts"]


class Contexts:
    """Makes the contexts of one engine, for memory that the caller gives them.

    `path`: the file for compiled kernels. It is read now, where TensorRT for RTX accepts what is there, and written
    when this object goes and there are new ones.
    """

    def __init__(self, trt: Any, engine: Any, path: Path):
        self._engine, self._how = engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "IRuntimeCache"):
            return
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(self._how)
        runtime_cache = runtime_config.create_runtime_cache()
        known = path.read_bytes() if path.is_file() else b""
        # Another driver's, or damaged: refused, and written anew.
        known = known if known and runtime_cache.deserialize(known) else b""
        runtime_config.set_runtime_cache(runtime_cache)
        self._how = runtime_config
        # Not at the interpreter's exit: the driver may be gone by then.
        weakref.finalize(self, _save, runtime_cache, known, path).atexit = False

    def make(self) -> Any:
        """A context, None when TensorRT makes none."""
        return self._engine.create_execution_context(self._how)


def _save(runtime_cache: Any, known: bytes, path: Path) -> None:
    data = bytes(runtime_cache.serialize())
    if data == known:
        return
    with contextlib.suppress(OSError):  # a bundle that cannot be written works without
        write_whole(path, data, durable=False)
